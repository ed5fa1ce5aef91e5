"""What a conversion gives: its record, and how the checkpoint is written from what was fitted."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmconvert.budget.allocation import choice_record
from spmconvert.budget.knapsack import Choice
from spmconvert.checkpoint.card import inherited_metadata, model_card
from spmconvert.checkpoint.manifest import FORMAT_VERSION, PROVENANCE_FILE, converted_config
from spmconvert.checkpoint.names import stacked_name
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.fit.blocks import Refined, refined
from spmconvert.fit.layer import LayerRecord, shown
from spmconvert.fit.stored import FitRun
from spmconvert.model.opened import restricted, stacked_names
from spmconvert.model.swap import layer_from_spec
from spmconvert.plan.plan import DTYPE_BYTES, layer_map
from spmconvert.version import __version__


@dataclass(frozen=True)
class Conversion:
    """The result of ``convert``.

    Attributes:
        output: the converted checkpoint.
        layers: one record a replaced layer.
        parameters_before: parameters of the whole checkpoint before.
        parameters_after: parameters of the whole checkpoint after.
        bytes_before: bytes of its tensors before.
        bytes_after: bytes of its tensors after.
        fitted_rows: calibration rows that were fitted, 0 without data.
        choosing_rows: calibration rows that designs were chosen on, 0 without a budget.
        held_out_rows: calibration rows on which errors were measured.
        choice: what a budget was spent on, None without one.
        left_dense: targeted layers that a budget left dense.
        budget_note: what a budget was spent on, in words.
        fit_note: what fits went for beside each layer's own error, in words.
        above_limit: layers whose final fit came out above the largest error that was allowed.
        speed: for a budget of time, how much faster the whole model is, as predicted and as measured.
    """

    output: Path
    layers: tuple[LayerRecord, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    fitted_rows: int
    choosing_rows: int
    held_out_rows: int
    choice: Choice | None = None
    left_dense: int = 0
    budget_note: str = ""
    fit_note: str = ""
    above_limit: tuple[str, ...] = ()
    speed: dict[str, Any] | None = None

    @property
    def measured_on(self) -> str:
        """What the records' errors were measured on, in words, and what fits went for beside them."""
        if not self.held_out_rows:
            return "relative squared Frobenius norm of the weight's error, no data was used"
        chosen_on = f", nor chosen on ({self.choosing_rows} were)" if self.choosing_rows else ""
        neither = "neither" if chosen_on else "not"
        measured = f"held out, on {self.held_out_rows} rows that were {neither} fitted ({self.fitted_rows} were){chosen_on}"
        return f"{measured}; {self.fit_note}" if self.fit_note else measured


def write_conversion(run: FitRun, conversion: Conversion) -> None:
    """Write weights, config, companions, provenance and model card, and make the output appear."""
    target, changed = run.target, refined(run)
    target.write_weights(list(output_tensors(run, changed)))
    target.add_text("config.json", _json(converted_config(run.source.config, layer_map(run.plan))))
    provenance = _provenance(run, conversion, changed)
    target.add_text(PROVENANCE_FILE, _json(provenance))
    target.add_text("README.md", _card(run, conversion, len(provenance["refined"]["tensors"])))
    for file in run.source.companion_files():
        target.add_file(str(file.relative_to(run.source.directory)), file)
    target.commit()


def output_tensors(run: FitRun, changed: Refined) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """Name, bytes and reader of every output tensor: the source's order, each target replaced where its weight was.

    The tensors of the experts of a projection are one, stacked in the order of the experts.
    """
    found: dict[tuple[str, bool], list[tuple[int, Callable[[], Tensor]]]] = {}
    for name, is_stacked, size, read in _tensors(run, changed):
        found.setdefault((name, is_stacked), []).append((size, read))
    for (name, is_stacked), own in found.items():
        readers = [read for _, read in own]
        yield name, sum(size for size, _ in own), partial(_stacked, readers) if is_stacked else readers[0]


def _stacked(readers: list[Callable[[], Tensor]]) -> Tensor:
    return torch.stack([read() for read in readers])


def _tensors(run: FitRun, changed: Refined) -> Iterator[tuple[str, bool, int, Callable[[], Tensor]]]:
    """Name, whether it is a part of a stack of that name, bytes and reader of every tensor."""
    replaced = {layer.weight: layer for layer in run.plan.layers}
    dropped = {layer.bias for layer in run.plan.layers}
    source = _source(run)
    stacks = stacked_names(source)
    for name, entry in source.tensors.items():
        if name in dropped:
            continue
        if name not in replaced:
            read = _reader(run, changed, name) or partial(source.read, name)
            yield stacks.get(name, name), name in stacks, entry.nbytes, read
            continue
        layer = replaced[name]
        item = DTYPE_BYTES[layer.stored_dtype]
        is_stacked = layer.target.stacked
        prefix = stacked_name(layer.prefix) if is_stacked else layer.prefix
        for part, tensor in layer_from_spec(layer.spec, device="meta").state_dict().items():
            size = tensor.numel() * (item if tensor.is_floating_point() else tensor.itemsize)
            fitted = partial(run.target.layers.tensor, layer.target.name, part)
            yield f"{prefix}.{part}", is_stacked, size, _reader(run, changed, f"{layer.prefix}.{part}") or fitted


def _source(run: FitRun) -> Checkpoint:
    """The source with those of its modules opened alone that have replaced layers."""
    return restricted(run.source, {layer.weight for layer in run.plan.layers})


def _reader(run: FitRun, changed: Refined, name: str) -> Callable[[], Tensor] | None:
    """Where a refined tensor is read, or None for one that was not refined."""
    return partial(run.target.blocks.tensor, changed.places[name], name) if name in changed.places else None


def _provenance(run: FitRun, conversion: Conversion, changed: Refined) -> dict[str, Any]:
    rows, stacks = run.rows, stacked_names(_source(run))
    vectors = (stacks.get(name, name) for name in changed.vectors)
    calibration = None
    if rows is not None:
        calibration = {
            "file_sha256": rows.file_sha256,
            "fitted_rows": len(rows.fitted),
            "choosing_rows": len(rows.choosing),
            "held_out_rows": len(rows.held_out),
            "seed": run.recipe.seed,
        }
    return {
        "format_version": FORMAT_VERSION,
        "spmconvert_version": __version__,
        "torch_version": torch.__version__,
        "source": {"name": run.source.name, "revision": run.source.revision, "sha256": run.source.sha256()},
        "recipe": run.recipe.model_dump(mode="json", exclude={"finetune"}),
        "calibration": calibration,
        "parameters": {"before": conversion.parameters_before, "after": conversion.parameters_after},
        "bytes": {"before": conversion.bytes_before, "after": conversion.bytes_after},
        "layers": [asdict(record) for record in conversion.layers],
        "allocation": conversion.choice and choice_record(conversion.choice, run.recipe.budget),
        "speed": conversion.speed,
        "refined": {"blocks": changed.blocks, "tensors": list(dict.fromkeys(vectors))},
        "left_alone": [asdict(skipped) for skipped in run.plan.selection.skipped],
    }


def _card(run: FitRun, conversion: Conversion, refined_tensors: int) -> str:
    sizes = (
        f"Parameters {conversion.parameters_before:,} before, {conversion.parameters_after:,} after; "
        f"tensor bytes {conversion.bytes_before:,} before, {conversion.bytes_after:,} after."
    )
    return model_card(
        source=run.source.name if run.source.revision else run.source.directory.resolve().name,
        source_sha256=run.source.sha256(),
        inherited=inherited_metadata(run.source.directory / "README.md"),
        rows=shown(conversion.layers),
        measured_on=conversion.measured_on,
        refined=refined_tensors,
        sizes=sizes,
        version=__version__,
    )


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
