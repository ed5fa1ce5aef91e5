"""What the quality benchmarks share: structures of equal size in the same places, fitted on the same rows, trained alike.

A structure is a rule from a layer's shape and a share of its parameters to a design. Whitened truncated SVD is the
baseline: two dense factors and the bias, the factors' norms balanced before training. All others are SPM layers, fitted as
the converter fits them. Fits are kept in a cache directory, since several trainings start from the same one.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.pytorch_utils import Conv1D

from spmconvert.calibrate.statistics import ActivationStatistics, collect
from spmconvert.data.calibration import load_rows
from spmconvert.data.training import TrainingData
from spmconvert.distill.distributed import make_accelerator, settled_precision
from spmconvert.distill.guide import Guide
from spmconvert.distill.loop import TrainingRun, match_layers, train
from spmconvert.distill.loss import Distillation
from spmconvert.distill.state import State, restore
from spmconvert.errors import OptionError
from spmconvert.fit.error import measure_error
from spmconvert.fit.solver import fit_
from spmconvert.model.architecture import load_config
from spmconvert.model.swap import replace_module
from spmconvert.operator.design import Design, staged_design
from spmconvert.operator.factors import covariance_root, rank_at, truncated_svd
from spmconvert.operator.geometry import Geometry
from spmconvert.operator.linear import SPMLinear
from spmconvert.outputs.objective import objective_for
from spmconvert.plan.targets import select_targets
from spmconvert.recipe.recipe import Calibration, Training

FIT_ITERATIONS = 200


class LowRankLinear(nn.Module):
    """y = U (V x) + bias."""

    def __init__(self, outward: Tensor, inward: Tensor, bias: Tensor) -> None:
        super().__init__()
        size = (inward.norm(dim=1) / outward.norm(dim=0)).sqrt()
        self.outward = nn.Parameter(outward * size)
        self.inward = nn.Parameter(inward / size[:, None])
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features] to [..., out_features]."""
        return nn.functional.linear(nn.functional.linear(x, self.inward), self.outward, self.bias)


@dataclass(frozen=True)
class Layer:
    """A dense layer to replace, with the moments of its inputs on fitted and on held-out rows."""

    name: str
    weight: Tensor
    bias: Tensor
    fitted: ActivationStatistics
    held_out: ActivationStatistics

    @property
    def dense(self) -> tuple[Tensor, Tensor]:
        """Weight [out_features, in_features] and bias."""
        return self.weight, self.bias


Rule = Callable[[int, int, float], Design]


def spm_only(in_features: int, out_features: int, keep: float) -> Design:
    """As many plain stages as the budget holds."""
    width = Geometry.create(in_features, out_features).width
    return staged_design(in_features, out_features, max(1, int(keep * in_features * out_features / (2 * width)) - 1))


def spm_and_rank(in_features: int, out_features: int, keep: float) -> Design:
    """One pass of plain stages, the rest of the budget for the companion."""
    return _with_rank(in_features, out_features, keep, None, 1)


def blocks_and_rank(in_features: int, out_features: int, keep: float) -> Design:
    """One stage of wide blocks for a third of the budget, the rest for the companion."""
    wanted = keep * min(in_features, out_features) / 6
    block = max(2, 2 ** round(torch.tensor(wanted).log2().item()))
    return _with_rank(in_features, out_features, keep, 1, block)


def blocks_only(in_features: int, out_features: int, keep: float) -> Design:
    """A pass over all strides of the widest blocks that fit.

    Raises:
        OptionError: when not even blocks of two do; plain stages would be another structure.
    """
    blocks = (2, 4, 8, 16, 32, 64)
    passes = (staged_design(in_features, out_features, None, "general", block) for block in blocks)
    allowed = int(keep * in_features * out_features)
    fitting = [one for one in passes if one.parameter_count(bias=False) <= allowed]
    if not fitting:
        raise OptionError(f"no pass of blocks fits into {keep:.0%} of {in_features} x {out_features}; keep more")
    return fitting[-1]


def _with_rank(in_features: int, out_features: int, keep: float, stages: int | None, block: int) -> Design:
    bare = staged_design(in_features, out_features, stages, "general", block)
    left = int(keep * in_features * out_features) - bare.parameter_count(bias=False)
    rank = max(0, rank_at(left, in_features, out_features))
    return staged_design(in_features, out_features, stages, "general", block, rank)


STRUCTURES: dict[str, Rule | None] = {
    "whitened SVD": None,
    "SPM": spm_only,
    "SPM + companion": spm_and_rank,
    "block SPM": blocks_only,
    "wide blocks + companion": blocks_and_rank,
}


def replace_layers(
    model: nn.Module, layers: Iterable[Layer], structure: str, keep: float, cache: Path, *, seed: int = 0
) -> None:
    """Put a fitted structure in the place of every layer."""
    for layer in layers:
        replace_module(model, layer.name, _fitted(layer, structure, keep, cache, seed))


@torch.no_grad()
def held_out_error(module: nn.Module, layer: Layer) -> float:
    """E‖y - ŷ‖² / E‖y‖² on the rows that were not fitted."""
    bias = module(torch.zeros(1, layer.weight.shape[1]))[0]
    matrix = (module(torch.eye(layer.weight.shape[1])) - bias).t()
    return measure_error(layer.dense, (matrix, bias), layer.held_out).relative


def _fitted(layer: Layer, structure: str, keep: float, cache: Path, seed: int) -> nn.Module:
    out_features, in_features = layer.weight.shape
    rule = STRUCTURES[structure]
    if rule is None:
        rank = rank_at(int(keep * layer.weight.numel()), in_features, out_features)
        outward, inward = truncated_svd(layer.weight, covariance_root(layer.fitted.covariance), rank)
        shift = (layer.weight - outward @ inward) @ layer.fitted.mean
        return LowRankLinear(outward, inward, layer.bias + shift)
    design = rule(in_features, out_features, keep)
    module = SPMLinear(in_features, out_features, terms=design.terms)
    digest = hashlib.sha256(layer.weight.numpy().tobytes() + layer.fitted.scatter.numpy().tobytes())
    digest.update(repr((design, seed, FIT_ITERATIONS)).encode())
    file = cache / f"{digest.hexdigest()[:32]}.pt"
    if file.exists():
        module.load_state_dict(torch.load(file, weights_only=True))
        return module
    fit_(module, layer.weight, layer.bias, layer.fitted, iterations=FIT_ITERATIONS, seed=seed)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), file)
    return module


def dense_layers(model: nn.Module, moments: dict[str, tuple[ActivationStatistics, ActivationStatistics]]) -> list[Layer]:
    """The layers that the moments belong to."""
    layers = []
    for name, (fitted, held_out) in moments.items():
        module = model.get_submodule(name)
        weight = module.weight.detach().t() if isinstance(module, Conv1D) else module.weight.detach()
        bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach()
        # no method gets a bias that the dense layer has not
        fitted = fitted.uncentred() if module.bias is None else fitted
        layers.append(Layer(name, weight.contiguous(), bias, fitted, held_out))
    return layers


def calibrated_layers(directory: Path, model: Any, text: Path, count: int) -> list[Layer]:
    """The MLP layers of a model with the moments of their inputs on calibration rows."""
    rows = load_rows(directory, load_config(directory), Calibration(file=text, rows=count), 0)
    names = [target.name for target in select_targets(model, targets=("mlp",), ignore=(), layers=None).targets]
    fitted, held_out = (collect(model, names, rows.batches(part, model)) for part in (rows.fitted, rows.held_out))
    return dense_layers(model, {name: (fitted[name], held_out[name]) for name in names})


def left_by_half_rank(layer: Layer) -> float:
    """Share of the centred output energy that whitened SVD leaves at half of the parameters."""
    out_features, in_features = layer.weight.shape
    rank = rank_at(layer.weight.numel() // 2, in_features, out_features)
    outward, inward = truncated_svd(layer.weight, covariance_root(layer.fitted.covariance), rank)
    shift = (layer.weight - outward @ inward) @ layer.fitted.mean
    return measure_error(layer.dense, (outward @ inward, layer.bias + shift), layer.held_out).centred


def distil(
    student: Any,
    teacher: Any,
    data: TrainingData,
    training: Training,
    structured: frozenset[str],
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> State:
    """Train a student as ``spmconvert finetune`` does, whatever its layers are; the best state is left in it."""
    training = settled_precision(training, "cpu")
    trained = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(
            training.train == "all" or name in structured or (training.train == "norms" and parameter.ndim == 1)
        )
        if parameter.requires_grad:
            trained[name] = parameter
    layers = tuple(dict.fromkeys(name.rpartition(".")[0] for name in sorted(structured)))
    order = {name: index for index, (name, _) in enumerate(student.named_modules())}
    layers = tuple(sorted(layers, key=order.__getitem__))
    distillation = Distillation(student, teacher, objective_for(student.config), training, layers)
    guided = round(training.guided * (training.steps or 0))
    run = TrainingRun(
        distillation=distillation,
        data=data,
        training=training,
        accelerator=make_accelerator(training, "cpu", shard=False, tracker=None, output=Path()),
        called=student,
        trained=trained,
        structured=structured,
        save=lambda _: None,
        report=report,
        guide=Guide(student, teacher, layers, guided) if guided else None,
    )
    if training.layerwise:
        match_layers(run, layers)
    state = train(run)
    restore({"state": {}, "parameters": state.best, "moments": None}, state, trained, None)
    return state


def remembering(teacher: Any) -> Any:
    """A copy of a frozen model that computes a batch's last hidden states once, since several trainings see the same rows.

    They are all it puts out; parts of the loss that need more are not for it.
    """
    copied = copy.deepcopy(teacher)
    known: dict[str, Tensor] = {}
    compute = copied.base_model.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        given = [value for value in (*args, *inputs.values()) if isinstance(value, Tensor)]
        key = repr([(value.shape, hashlib.sha256(value.numpy().tobytes()).digest()) for value in given])
        if key not in known:
            known[key] = compute(*args, **inputs)[0]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=known[key])

    copied.base_model.forward = forward
    return copied


def save_json(file: Path | None, content: dict[str, Any]) -> None:
    """Write results where asked to."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n")
