"""How transformers loads, saves and trains a converted checkpoint: the quantisation method ``spm``.

transformers lets a third party take part in ``from_pretrained`` through a quantizer: it builds the model without memory,
calls us to swap modules, streams the tensors in, and calls us again. That is all this format needs; there is no code in
the checkpoint and nothing of transformers is patched. Two paths:

- a converted checkpoint: layers are swapped from the layer map before the weights are read, and afterwards every SPM
  parameter must have come from the file;
- a dense checkpoint loaded with ``quantization_config=SPMConfig(targets=...)``: the model is loaded as it is, then fitted
  and swapped in memory, and ``save_pretrained`` writes a converted checkpoint.

What it gives up: a program that never imports spmconvert cannot load the checkpoint. What a conversion wrote is refused by
the name that its config gives for the weight file (``manifest.GUARD``). ``save_pretrained`` writes no such name; what it
wrote fails by the shape of ``weight``, which no dense layer can have, unless ``ignore_mismatched_sizes`` is given.
Tensor-parallel plans that name a replaced layer are refused.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spmconvert.checkpoint.manifest import (
    FORMAT_VERSION,
    GUARD,
    GUARD_KEY,
    INT8_KEY,
    QUANT_METHOD,
    LayerSpec,
    check_format_version,
    single_layers,
)
from spmconvert.checkpoint.names import resolve_name
from spmconvert.errors import CheckpointError, CorruptCheckpointError, OptionError
from spmconvert.model.int8 import dequantize_, int8_linears_
from spmconvert.model.int8_stored import mark_loaded_, read_metadata, stored_form, stored_parts
from spmconvert.model.opened_module import OpenedModule
from spmconvert.model.opening import close_
from spmconvert.model.places import modules_around
from spmconvert.model.stacked_experts import StackedExperts, is_converted
from spmconvert.model.stacked_layer import StackedLayer
from spmconvert.model.swap import dense_layer, replace_module, swap_layers, unstack_
from spmconvert.operator.int8 import INT8_MODES, Int8Mode, check_torchao
from spmconvert.operator.linear import SPMLinear
from spmconvert.recipe.loading import recipe_from_keywords
from spmconvert.recipe.recipe import Recipe
from spmconvert.version import __version__

_MAP_KEYS = ("quant_method", "format_version", "spmconvert_version", "layers")


class SPMConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a converted checkpoint, or a request to convert a dense one while it is loaded.

    Args:
        layers: layer map of a converted checkpoint; None for a request.
        format_version: version of the checkpoint format.
        spmconvert_version: version that wrote the checkpoint.
        quant_method: always ``spm``; transformers passes it back.
        int8: how the model was quantised after its conversion, one of ``INT8_MODES``; None for floating point.
        **recipe: keys of a request, as in a recipe file, dotted where they are in a table:
            ``SPMConfig(targets=["mlp"], **{"design.stages": 11})``. ``stages``, ``variant``, ``block``, ``rank`` and
            ``calib`` may be given directly.

    Raises:
        CheckpointError: when the format version or a layer is not readable.
        RecipeError: when a key is unknown or a value outside its range.
        OptionError: when a layer map and recipe keys are both given.
    """

    def __init__(
        self,
        layers: dict[str, Any] | None = None,
        *,
        format_version: int = FORMAT_VERSION,
        spmconvert_version: str = __version__,
        quant_method: str = QUANT_METHOD,
        int8: Int8Mode | None = None,
        **recipe: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise OptionError(f"quant_method is {quant_method!r}; an SPMConfig is always {QUANT_METHOD!r}")
        if layers is not None and recipe:
            raise OptionError(
                f"layers and {', '.join(recipe)} are both given; a converted checkpoint has its design already"
            )
        check_format_version(format_version)
        if int8 is not None and (int8 not in INT8_MODES or layers is None):
            raise CheckpointError(f"int8 in quantization_config is {int8!r}; beside layers it is one of {INT8_MODES}")
        self.int8 = int8
        self.quant_method = quant_method
        self.format_version = format_version
        self.spmconvert_version = spmconvert_version
        self.layers = layers
        self.request = (
            None if layers is not None else recipe_from_keywords(recipe).model_dump(mode="json", exclude={"finetune"})
        )
        self.specs()

    def specs(self) -> dict[str, LayerSpec]:
        """The layer map, parsed."""
        return {name: LayerSpec.from_json(name, entry) for name, entry in (self.layers or {}).items()}

    def recipe(self) -> Recipe:
        """The request, parsed."""
        return Recipe.model_validate(self.request or {})

    def to_dict(self) -> dict[str, Any]:
        """What config.json carries: plain JSON values. A request has no layers yet."""
        found = {key: getattr(self, key) for key in _MAP_KEYS}
        return found if self.int8 is None else {**found, INT8_KEY: self.int8}


class SPMCheckpointConfig(SPMConfig):
    """The same as it is read from a converted checkpoint.

    transformers refuses a second ``quantization_config`` for a checkpoint that has one only where the classes differ in
    their names, and ignores it otherwise.
    """


def swap_(model: Any) -> list[str]:
    """Put converted layers with fresh parameters into a model that ``from_config`` made of a converted checkpoint's config.

    ``from_config`` asks no quantizer: what it makes is dense. With its layers in place accelerate's
    ``load_checkpoint_and_dispatch`` can fill it, and ``save_pretrained`` writes a converted checkpoint.

    Args:
        model: with or without memory; changed in place.

    Returns:
        Names of the replaced layers.

    Raises:
        OptionError: when its config is of no converted checkpoint, or of one in int8.
        CheckpointError: when the config cannot be read, or describes layers that the model does not have.
    """
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD:
        config = SPMCheckpointConfig.from_dict(config)
    if not isinstance(config, SPMConfig) or config.layers is None or config.int8 is not None:
        raise OptionError("the model's config has no layer map in floating point; take that of a converted checkpoint")
    replaced = swap_layers(model, config.specs())
    model.config.quantization_config = config
    model.hf_quantizer = SPMQuantizer(config)
    return replaced


class SPMQuantizer(HfQuantizer):  # type: ignore[misc]
    """Takes part in ``from_pretrained`` and ``save_pretrained``."""

    requires_calibration = False

    def update_attn_implementation(self, config: Any) -> Any:
        """Take the guard off; of all hooks the one that sees the config before transformers looks for files."""
        if getattr(config, GUARD_KEY, None) == GUARD:
            delattr(config, GUARD_KEY)
        return config

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Refuse what int8 cannot be loaded with.

        Raises:
            OptionError: when torchao is missing, or parts are to stay on disk.
        """
        if self.quantization_config.int8 is None:
            return
        check_torchao()
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise OptionError("int8 tensors cannot stay on disk; load without a device_map, or the model before int8")

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> nn.Module:
        if self.pre_quantized:
            _keep_from_initialising(model, swap_layers(model, self.quantization_config.specs()))
        if self.pre_quantized and self.quantization_config.int8 is not None:
            int8_linears_(model)
            self.metadata = read_metadata(checkpoint_files or [])
        # those of the revision, subfolder and variant that are being loaded
        self._files = [Path(file) for file in checkpoint_files or ()]
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if self.pre_quantized:
            _check_complete(model)
            mark_loaded_(model, self.quantization_config.int8)
        else:
            # only for this: it takes more imports than loading does
            from spmconvert.commands.in_memory import convert_in_memory_

            specs = convert_in_memory_(model, self._files, self.quantization_config.recipe())
            self.quantization_config.layers = {name: spec.to_json() for name, spec in specs.items()}
            self.quantization_config.request = None
        # ordinary floating point: half(), float() and the Trainer apply
        model.is_quantized = self.quantization_config.int8 is not None  # type: ignore[assignment]
        return model

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """Names of the parts that int8 parameters are stored as, by the parameter's last name."""
        return {} if self.quantization_config.int8 is None or not self.pre_quantized else stored_parts(self.metadata)

    def get_load_operations(self) -> dict[str, Any]:
        """What puts the parts together."""
        from transformers.integrations.torchao import TorchAoDeserialize

        return {} if self.quantization_config.int8 is None else {"deserialize": TorchAoDeserialize}

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Drop the entries of replaced layers, which cannot be sharded by rows or columns.

        Raises:
            CheckpointError: when tensor parallelism is in use and the plan names a replaced layer.
        """
        replaced = {name for name, module in model.named_modules() if is_converted(module)}
        patterns = {_pattern(name) for name in replaced}
        # fused parameters are not there any more
        kinds = (OpenedModule, StackedExperts)
        experts = {_pattern(name) for name, module in model.named_modules() if isinstance(module, kinds)}
        hit = [
            key
            for key in plan
            if key.removesuffix(".weight") in patterns or key in experts or key.rpartition(".")[0] in experts
        ]
        if hit and getattr(model, "_tp_size", None):
            raise CheckpointError(f"tensor parallelism cannot split the SPM layers {hit}; load without tp_plan")
        for key in hit:
            del plan[key]

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        """Put the dense layer in the place of every SPM layer, in place, for ``model.dequantize()``."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dequantize_(model)
        unstack_(model)
        for _, spec, name, layer in self._replaced(model, single_layers(self.quantization_config.specs())):
            replace_module(model, name, dense_layer(layer, conv1d=spec.fan_in_fan_out, dtype=dtype))
        close_(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Have the layer map say what the layers are when they are saved: merging an adapter adds to the rank of one.

        Returns:
            int8 parameters in their parts, among all others, and what is said about them; None where there are none.

        Raises:
            CheckpointError: when something else than ``quantize_`` has quantised the model.
        """
        for entry, spec, _, layer in self._replaced(model, self.quantization_config.specs()):
            now = replace(spec, design=layer.design, bias=layer.held_bias is not None)
            self.quantization_config.layers[entry] = now.to_json()
        return stored_form(model, self.quantization_config.int8)

    def _replaced(self, model: nn.Module, specs: dict[str, LayerSpec]) -> list[tuple[str, LayerSpec, str, SPMLinear]]:
        """The SPM layers of a model that are not stacked: name and entry in the layer map, name and module in the model."""
        layers = {name: module for name, module in model.named_modules() if isinstance(module, SPMLinear)}
        prefix = getattr(model, "base_model_prefix", "")
        names = {entry: resolve_name(entry, layers, prefix) for entry in specs}
        return [(entry, specs[entry], name, layers[name]) for entry, name in names.items() if name is not None]

    def is_serializable(self) -> bool:
        """A converted model is saved like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """SPM layers are trained by ordinary optimizers, int8 is not."""
        return self.quantization_config.int8 is None

    @property
    def is_qat_trainable(self) -> bool:
        """What the Trainer asks before it accepts a model with a quantisation config."""
        return self.quantization_config.int8 is None

    @property
    def is_compileable(self) -> bool:
        """The operator has no graph breaks."""
        return True


def _pattern(name: str) -> str:
    """A module's name as parallel plans have it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _keep_from_initialising(model: nn.Module, replaced: list[str]) -> None:
    """Tell transformers that the modules around replaced layers need no fresh parameters.

    It goes over every module after loading, and those that it knows (an MLP of SigLIP, a head of Grounding DINO) reach for
    the weights and biases of layers at any depth, which a replaced one may not have under these names, nor its factors.
    Modules with tensors of their own are left to it. ``_check_complete`` looks after the layers.
    """
    for name in replaced:
        for around in modules_around(model, name):
            around._is_hf_initialized = True  # type: ignore[assignment]


def _check_complete(model: nn.Module) -> None:
    """Every tensor of an SPM layer, and of what is stacked beside one, must have come from the checkpoint.

    Raises:
        CorruptCheckpointError: when one was missing or had another shape.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (SPMLinear, StackedLayer)):
            continue
        for part, tensor in module.state_dict(keep_vars=True).items():
            if not (getattr(tensor, "_is_hf_initialized", False) or _on_disk(module, part)):
                raise CorruptCheckpointError(
                    f"tensor {name}.{part} {tuple(tensor.shape)} is missing from the checkpoint or has another shape; "
                    "download it again or convert again"
                )


def _on_disk(layer: nn.Module, part: str) -> bool:
    """Whether accelerate keeps a tensor on disk, in the right shape, and reads it whenever its module runs."""
    owner, _, name = part.rpartition(".")
    module = layer.get_submodule(owner)
    tensor: Tensor = getattr(module, name)
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    return tensor.is_meta and weights is not None and name in weights and weights[name].shape == tensor.shape


def _register() -> None:
    # the module may be executed again in one process (importlib.reload), and registering twice is an error
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(SPMCheckpointConfig)
        register_quantizer(QUANT_METHOD)(SPMQuantizer)


_register()
