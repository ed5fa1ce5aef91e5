"""What a conversion will do, before any weight is read: layers, designs, parameters, bytes, FLOPs, time and memory.

Everything here comes from the config, the headers and integers; the model is on the meta device. The time is a prediction:
the cost of the solver's products divided by the speed of a short matrix product on this machine.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from spmconvert.checkpoint.headers import SAFETENSORS_DTYPES
from spmconvert.checkpoint.manifest import LayerSpec, stacked_layers
from spmconvert.checkpoint.names import stacked_name
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.data.media import TENSOR_SUFFIX
from spmconvert.data.tokens import reads_tokens
from spmconvert.errors import CheckpointError, OptionError, TargetError, UnsupportedLayerError
from spmconvert.model.stored import StoredNames
from spmconvert.model.towers import Tower
from spmconvert.operator.design import Design, staged_design
from spmconvert.plan.targets import Selection, Target, matches, select_targets
from spmconvert.recipe.recipe import LayerDesign, Recipe

# share of a large matrix product's speed that a fit reaches, merging included; 0.25 to 0.45 measured on 384 to 3072 wide
# layers with two cores
FIT_EFFICIENCY = 0.3
# names that new tensors are like: the mark, and a parameter of a term
PROBED_PARTS = ("weight", "lowrank.up.weight", "spm.values")
# bytes a parameter takes in each dtype a converted layer may be stored in
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class LayerPlan:
    """One layer that will be replaced.

    Attributes:
        target: the dense layer.
        spec: what will be in its place.
        weight: name of its weight tensor in the checkpoint.
        bias: name of its bias tensor in the checkpoint, or None.
        prefix: what its new tensors are called there, without the parameter.
        stored_dtype: dtype in which the new parameters are stored.
        dense_bytes: bytes of the dense layer in the checkpoint.
    """

    target: Target
    spec: LayerSpec
    weight: str
    bias: str | None
    prefix: str
    stored_dtype: str
    dense_bytes: int

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense layer, bias included."""
        dense_bias = self.target.out_features if self.target.bias else 0
        return self.target.in_features * self.target.out_features + dense_bias

    @property
    def parameters(self) -> int:
        """Parameters of the new layer, bias included."""
        return self.spec.parameter_count()

    @property
    def bytes(self) -> int:
        """Bytes of the new layer in the checkpoint."""
        return self.spec.stored_bytes(DTYPE_BYTES[self.stored_dtype])

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs of the dense and of the new layer for a token of the text; experts see a share of these."""
        return self.target.flops(2 * self.target.in_features * self.target.out_features), self.flops_of(self.spec.design)

    def flops_of(self, design: Design) -> int:
        """The same of another design."""
        return self.target.flops(design.flops_per_token())


@dataclass(frozen=True)
class ConversionPlan:
    """The whole conversion.

    Attributes:
        layers: layers that will be replaced, in the order of the model.
        selection: these and the layers that were left alone, with reasons.
        other_bytes: bytes of all tensors that are copied unchanged.
    """

    layers: tuple[LayerPlan, ...]
    selection: Selection
    other_bytes: int

    @property
    def output_bytes(self) -> int:
        """Bytes of the tensors that will be written."""
        return self.other_bytes + sum(layer.bytes for layer in self.layers)

    def predicted_seconds(self, recipe: Recipe) -> float:
        """Predicted time of all fits on this machine's CPU, without the calibration run."""
        # closed forms take a few decompositions and no iterations
        fitted = [layer for layer in self.layers if layer.spec.design.is_iterative]
        work = sum(3 * layer.spec.design.flops_per_token() * layer.target.in_features for layer in fitted)
        return recipe.fit.iterations * work / (FIT_EFFICIENCY * _product_speed())

    def predicted_memory(self, *, calibrated: bool) -> int:
        """Predicted memory beside the running program, in bytes: model and statistics, or the largest single fit."""
        largest = max(
            layer.target.in_features * (layer.target.in_features + 3 * layer.target.out_features) for layer in self.layers
        )
        dense = self.other_bytes + sum(layer.dense_bytes for layer in self.layers)
        statistics = sum(statistics_bytes(layer.target.in_features) for layer in self.layers)
        return 8 * largest + ((dense + min(statistics, STATISTICS_BUDGET)) if calibrated else 0)


def layer_map(plan: ConversionPlan) -> dict[str, LayerSpec]:
    """The layer map of what a plan makes: one entry for all experts of a projection."""
    layers = {layer.target.name: layer for layer in plan.layers}
    return stacked_layers(
        {name: layer.spec for name, layer in layers.items()}, {name: layer.target.stack for name, layer in layers.items()}
    )


# statistics of more layers than fit in here are gathered in several runs over the calibration rows
STATISTICS_BUDGET = 1 << 30


def statistics_bytes(in_features: int) -> int:
    """Memory that the statistics of one layer take."""
    return 4 * in_features * (in_features + 1)


def statistics_groups(layers: Sequence[LayerPlan], *, weighted: bool = False) -> Iterator[list[LayerPlan]]:
    """Cut the layers into runs whose statistics fit in memory together; each costs one calibration run."""
    group: list[LayerPlan] = []
    used = 0
    for layer in layers:
        size = statistics_bytes(layer.target.in_features)
        size += statistics_bytes(layer.target.out_features) if weighted else 0
        if group and used + size > STATISTICS_BUDGET:
            yield group
            group, used = [], 0
        group.append(layer)
        used += size
    if group:
        yield group


def plan_conversion(checkpoint: Checkpoint, model: Any, recipe: Recipe) -> ConversionPlan:
    """Resolve targets and designs against a checkpoint.

    Args:
        checkpoint: the source.
        model: its module tree, on any device; only shapes are read.
        recipe: what to do.

    Raises:
        TargetError: when nothing matches, or a layer would grow and ``allow_growth`` is off.
        UnsupportedLayerError: when a layer has no tensor of its own in the checkpoint, or a dtype that cannot be fitted.
        OptionError: when an override matches none of the targets, or a design does not fit a layer.
    """
    tower: Tower | None = "text" if _runs_text(recipe, model.config) else None
    selection = select_targets(model, targets=recipe.targets, ignore=recipe.ignore, layers=recipe.layers, tower=tower)
    for override in recipe.overrides:
        if not any(matches(override.pattern, target.name) for target in selection.targets):
            raise OptionError(
                f"override pattern {override.pattern!r} matches none of the {len(selection.targets)} targeted layers, "
                f"for example {selection.targets[0].name}"
            )
    names = StoredNames.of(model, checkpoint.tensors)
    _check_shapes(checkpoint, model, names)
    layers = tuple(_plan_layer(checkpoint, target, names, recipe) for target in selection.targets)
    _check_groups(layers)
    if not recipe.budget.limits:
        _refuse_growth(layers, recipe)
    replaced = {name for layer in layers for name in (layer.weight, layer.bias)}
    other = sum(entry.nbytes for name, entry in checkpoint.tensors.items() if name not in replaced)
    return ConversionPlan(layers, selection, other)


def _check_shapes(checkpoint: Checkpoint, model: Any, names: StoredNames) -> None:
    """Refuse a config that describes another model than the tensors are of, before any of them is loaded.

    Raises:
        CheckpointError: when a parameter has another shape.
    """
    for name, parameter in model.named_parameters():
        stored = names.tensor(name)
        found = None if stored is None else checkpoint.tensors[stored].shape
        if found is not None and found != tuple(parameter.shape):
            raise CheckpointError(
                f"{stored} is {found} in the checkpoint, and {tuple(parameter.shape)} in the model that config.json "
                "describes; download them again"
            )


def _runs_text(recipe: Recipe, config: Any) -> bool:
    """Whether a calibration would run a model of several towers on text alone, as far as its file tells."""
    file = recipe.calibration.file
    return file is not None and file.suffix != TENSOR_SUFFIX and not file.is_dir() and reads_tokens(config)


def design_for(target: Target, recipe: Recipe) -> LayerDesign:
    """The recipe's design with the overrides that match; later ones win.

    Raises:
        OptionError: when they describe no layer together.
    """
    design = recipe.design
    for override in recipe.overrides:
        if matches(override.pattern, target.name):
            try:
                design = override.changed(design)
            except ValidationError as error:
                reason = error.errors()[0]["ctx"]["error"]
                raise OptionError(f"override {override.pattern!r} leaves {target.name} no design: {reason}") from None
    return design


def _plan_layer(checkpoint: Checkpoint, target: Target, names: StoredNames, recipe: Recipe) -> LayerPlan:
    weight = _tensor_name(names, f"{target.name}.weight")
    entry = checkpoint.tensors[weight]
    dense_dtype = SAFETENSORS_DTYPES.get(entry.dtype)
    if dense_dtype is None:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise UnsupportedLayerError(
            f"{weight} has dtype {entry.dtype}; only {known} can be fitted, use --ignore {target.name}"
        )
    shape = (target.out_features, target.in_features)
    if entry.shape != (shape[::-1] if target.kind == "conv1d" else shape):
        raise UnsupportedLayerError(
            f"{weight} is {entry.shape} in the checkpoint, the model has {shape}; config.json is wrong"
        )
    bias = _tensor_name(names, f"{target.name}.bias") if target.bias else None
    prefix = _prefix(names, target, weight.removesuffix(".weight"))
    if prefix is None:
        raise UnsupportedLayerError(
            f"transformers would rename the new tensors of {target.name} while it loads them; leave it out with "
            f"--ignore {target.name}"
        )
    design = design_for(target, recipe)
    layer_design = _named_design(target, design)
    pinned = None if recipe.dtype in ("auto", dense_dtype) else recipe.dtype
    new_bias = recipe.fit.new_bias and recipe.calibration.file is not None
    spec = LayerSpec(layer_design, target.bias or new_bias, target.kind == "conv1d", pinned)
    dense_bytes = entry.nbytes + (checkpoint.tensors[bias].nbytes if bias else 0)
    return LayerPlan(target, spec, weight, bias, prefix, pinned or dense_dtype, dense_bytes)


def _prefix(names: StoredNames, target: Target, stored: str) -> str | None:
    """What a layer's tensors are called in the output, or None where no name will do; an expert's are written stacked."""
    if not target.stacked:
        return names.module(target.name, stored, PROBED_PARTS)
    found = names.module(stacked_name(target.name), stacked_name(stored), PROBED_PARTS)
    if found is None:
        return None
    around, _, projection = found.rpartition(".")
    return f"{around}.{target.name.rsplit('.', 2)[1]}.{projection}"


def _named_design(target: Target, design: LayerDesign) -> Design:
    """The design that a recipe names, at the size of a layer."""
    sizes = (target.in_features, target.out_features)
    try:
        if design.terms is not None:
            return Design.from_options(*sizes, design.terms)
        return staged_design(*sizes, design.stages, design.variant, design.block, design.rank)
    except OptionError as error:
        raise OptionError(f"layer {target.name}, {sizes[0]} x {sizes[1]}: {error}") from None


def _tensor_name(names: StoredNames, name: str) -> str:
    tensor_name = names.tensor(name)
    if tensor_name is None:
        raise UnsupportedLayerError(
            f"{name} is no tensor of the checkpoint (missing, or merged or split when the model loads); leave it out with "
            "--ignore"
        )
    return tensor_name


def _check_groups(layers: tuple[LayerPlan, ...]) -> None:
    """Refuse experts of a projection that would not be of one form, which is what is stored.

    Raises:
        OptionError: when an override names some of them, or they are stored in several dtypes.
    """
    first: dict[str, LayerPlan] = {}
    for layer in layers:
        other = first.setdefault(layer.target.stack or layer.target.name, layer)
        if (layer.spec, layer.stored_dtype) != (other.spec, other.stored_dtype):
            forms = [f"{one.spec.design.describe()} in {one.stored_dtype}" for one in (other, layer)]
            raise OptionError(
                f"{other.target.name} would be {forms[0]} and {layer.target.name} {forms[1]}; all experts of a projection "
                "have one form, so let overrides name them together, such as *.experts.*.down"
            )


def _refuse_growth(layers: tuple[LayerPlan, ...], recipe: Recipe) -> None:
    grown = [layer for layer in layers if layer.parameters >= layer.dense_parameters]
    if grown and not recipe.allow_growth:
        worst = max(grown, key=lambda layer: layer.parameters / layer.dense_parameters)
        raise TargetError(
            f"{len(grown)} of {len(layers)} layers would not get smaller, {worst.target.name} goes from "
            f"{worst.dense_parameters:,} to {worst.parameters:,} parameters; use fewer stages, a smaller block or rank, "
            "--ignore them, or --set allow_growth=true"
        )


def _product_speed() -> float:
    """FLOPs per second of a matrix product of 768 x 768, the best of a few."""
    a = torch.rand(768, 768)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2 * 768**3 / best
