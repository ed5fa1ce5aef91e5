"""A converted checkpoint that carries its own code: the same weights, and one file that torch and transformers can run.

``modeling_spm.py`` is cut out of this package's own source (``source``): the plain form of the terms that the checkpoint
has and no others, and the classes that ``auto_map`` in config.json names, one for every Auto class that the architecture
has and whose model has converted layers. It loads with ``trust_remote_code=True`` where spmconvert is not installed.

Without that argument nothing is loaded: the model type in config.json is unknown to transformers, which says then that the
repository has code of its own. What it gives up: a concrete class of transformers (``BertModel.from_pretrained``) does not
ask; it fails on the shape of the layers' mark, unless it is told to ``ignore_mismatched_sizes``. Experts and recurrences,
whose opened modules are many times the code of a layer, are refused.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from spmconvert.checkpoint.converted import Converted
from spmconvert.checkpoint.headers import INDEX_FILE
from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.checkpoint.names import resolve_name
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.errors import CheckpointError, UnsupportedLayerError
from spmconvert.exporting.comparison import compare_loaded
from spmconvert.exporting.form import Written, add_companions, card, plain_config, refuse_opened
from spmconvert.exporting.source import bundled
from spmconvert.model.architecture import load_config, model_class, skeleton
from spmconvert.model.loading import load
from spmconvert.model.portable import FOREIGN, PortableConfig, PortableModel
from spmconvert.operator.plain import PlainMonarch, PlainSparse24, PlainStages, PlainWrapped24, plain_lowrank
from spmconvert.operator.terms.term import Term
from spmconvert.version import __version__

MODULE = "modeling_spm"
# what builds a term, by its kind; wrapped 2:4 is told apart in ``plain_form``
PLAIN: dict[str, Any] = {
    "spm": PlainStages,
    "monarch": PlainMonarch,
    "blockdense": PlainMonarch,
    "sparse24": PlainSparse24,
    "lowrank": plain_lowrank,
}
_CARD = f"""the same weights, with
the code of the replaced layers in `{MODULE}.py`. It needs torch and transformers, not spmconvert, and the permission to run
that code:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("this directory", trust_remote_code=True)
```

Without `trust_remote_code=True` transformers refuses the checkpoint. Stages and 2:4 layers run as the dense matrices that
they are, low rank and block-diagonal ones as their factors."""


class Portable:
    """The portable form of a converted checkpoint.

    Raises:
        UnsupportedLayerError: when a layer is an expert's or a recurrence's, or has a kind of term without a plain form.
    """

    def __init__(self, converted: Converted) -> None:
        self.converted = converted
        refuse_opened(converted, f"which {MODULE}.py has no code for")
        self.layers = {name: _entry(name, spec) for name, spec in converted.layers.items()}

    @property
    def needed_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.converted.tensors.values())

    def write(self, target: OutputDirectory) -> Written:
        """Copy the weights, write code and config, and compare."""
        converted = self.converted
        for file in sorted({entry.file for entry in converted.tensors.values()}):
            target.add_file(file.name, file)
        if (converted.directory / INDEX_FILE).is_file():
            target.add_file(INDEX_FILE, converted.directory / INDEX_FILE)
        config = load_config(converted.directory)
        auto_map = auto_classes(config, self.layers)
        target.add_text(f"{MODULE}.py", self.module(config, sorted({*auto_map.values(), config.architectures[0]})))
        target.add_text("config.json", json.dumps(self.config(auto_map, type(config).__name__), indent=2) + "\n")
        target.add_text("README.md", card(converted, "portable", _CARD))
        add_companions(converted, target)
        with _imported(target.final / f"{MODULE}.py") as module:
            architecture = getattr(module, config.architectures[0])
            comparison = compare_loaded(
                converted.directory,
                lambda: load(converted.directory, dtype="auto"),
                lambda: architecture.from_pretrained(target.final, dtype="auto"),
            )
        return Written(self.needed_bytes, comparison, note=f"load it with trust_remote_code=True: {', '.join(auto_map)}")

    def config(self, auto_map: dict[str, str], config_class: str) -> dict[str, Any]:
        """What config.json says.

        Args:
            auto_map: model classes by the Auto classes that they are for.
            config_class: name of the config's class.
        """
        entries = plain_config(self.converted)
        places = {"AutoConfig": config_class, **auto_map}
        return {
            **entries,
            "model_type": FOREIGN + entries["model_type"],
            "auto_map": {auto: f"{MODULE}.{name}" for auto, name in places.items()},
            "spm_layers": self.layers,
        }

    def module(self, config: Any, models: Sequence[str]) -> str:
        """The text of the module, with classes for these models of transformers."""
        config_class = type(config).__name__
        forms = {form: None for layer in self.layers.values() for form, _ in layer["terms"].values()}
        builders = [builder for builder in (*PLAIN.values(), PlainWrapped24) if builder.__name__ in forms]
        source = bundled([PortableConfig, PortableModel, *dict.fromkeys(builders)])
        names = ", ".join(f'"{name}": {name}' for name in forms)
        listed = ", ".join(f'"{name}"' for name in models)
        return f'''"""{config.architectures[0]} with layers that spmconvert {__version__} replaced; part of its checkpoint.

Licence of this file: Apache-2.0. It was cut out of spmconvert and is not meant to be edited.
"""

from __future__ import annotations

import transformers
{source}

class {config_class}(PortableConfig, transformers.{config_class}):
    """The config of transformers, under another model type in files."""


PortableModel.term_forms = {{{names}}}
for _name in ({listed},):
    _bases = (PortableModel, getattr(transformers, _name))
    globals()[_name] = type(_name, _bases, {{"config_class": {config_class}, "__module__": __name__}})
'''


def plain_form(term: Term) -> tuple[str, dict[str, Any]]:
    """What builds a term in a portable checkpoint, and the numbers that it takes beside the layer's sizes.

    Raises:
        UnsupportedLayerError: when there is none.
    """
    numbers = term.to_json()
    kind = numbers.pop("kind")
    if kind not in PLAIN:
        raise UnsupportedLayerError(
            f"a term is of the kind {kind}, which has no plain form; export with --format dense, or add it to "
            "operator/plain"
        )
    if kind == "sparse24":
        wrapped = numbers["wrap"]
        own = {"block": numbers["wrap_block"], "stages": numbers["wrap_stages"]} if wrapped else {}
        return (PlainWrapped24 if wrapped else PlainSparse24).__name__, own
    return PLAIN[kind].__name__, numbers


def auto_classes(config: Any, layers: Sequence[str] | dict[str, Any]) -> dict[str, str]:
    """Model classes by the Auto classes of transformers that find them for a config, where they have converted layers."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    fits: dict[str, bool] = {}
    for name, auto in sorted(vars(modeling_auto).items()):
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("Auto") else None
        if mapping is None or type(config) not in mapping:
            continue
        classes = mapping[type(config)]
        candidates = classes if isinstance(classes, tuple | list) else (classes,)
        chosen = next((each for each in candidates if each.__name__ in config.architectures), candidates[0])
        # some read the config of one tower
        if chosen.config_class is type(config):
            if chosen.__name__ not in fits:
                fits[chosen.__name__] = _has_layers(config, chosen, layers)
            if fits[chosen.__name__]:
                found[name] = chosen.__name__
    return found


def _has_layers(config: Any, architecture: Any, layers: Sequence[str] | dict[str, Any]) -> bool:
    try:
        model = skeleton(config, architecture)
    except CheckpointError:
        # the config of another head
        return architecture is model_class(config)
    modules = dict(model.named_modules())
    return any(resolve_name(name, modules, model.base_model_prefix) is not None for name in layers)


def _entry(name: str, spec: LayerSpec) -> dict[str, Any]:
    """One layer as config.json has it."""
    design, terms = spec.design, {}
    for term in design.terms:
        try:
            form, numbers = plain_form(term)
        except UnsupportedLayerError as error:
            raise UnsupportedLayerError(f"{name}: {error}") from None
        if term.kind == "lowrank":
            numbers["bias"] = spec.bias
        terms[term.kind] = [form, numbers]
    sizes = {"in": design.in_features, "out": design.out_features}
    return {**sizes, "bias": spec.bias, "dtype": spec.dtype, "terms": terms}


@contextmanager
def _imported(file: Path) -> Iterator[ModuleType]:
    """A module of a file, for a while: as transformers imports it, without a copy in its cache."""
    name = f"spmconvert_exported_{MODULE}"
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        specification.loader.exec_module(module)
        yield module
    finally:
        sys.dont_write_bytecode = written
        del sys.modules[name]
