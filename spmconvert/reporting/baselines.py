"""The simpler methods a user could take instead, made from the same dense model and the same calibration rows.

- Whitened truncated SVD with no more parameters than each SPM layer, run as two matrix products.
- Magnitude 2:4: of every four weights of an output the two largest stay. Run as a dense product, because that is what
  happens without kernels and hardware for it; half of the weights are stored, with two bits of position each.

Both get the exact bias correction that an SPM layer gets, their blocks are refined as the conversion's were, and neither is
finetuned. Rows are not needed for a third:

- int8 of the untouched model by torchao, weight-only and dynamic, which is what most would take first. Heads, embeddings
  and fused experts stay in floating point, as transformers has it.

Models share every tensor that they do not change.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from spmconvert.calibrate.statistics import ActivationStatistics, collect
from spmconvert.checkpoint.manifest import LayerSpec
from spmconvert.data.calibration import CalibrationRows
from spmconvert.fit.blocks import following_batches
from spmconvert.fit.layer import whitened_svd
from spmconvert.fit.refine import refine_model_
from spmconvert.model.int8 import quantize_linears_
from spmconvert.model.opening import group_of, open_
from spmconvert.model.swap import copy_sharing_tensors, replace_module
from spmconvert.operator.int8 import INT8_MODES, check_torchao
from spmconvert.plan.plan import STATISTICS_BUDGET, statistics_bytes

METHODS = {"svd": "whitened SVD, equal parameters", "2:4": "magnitude 2:4"}
INT8 = {"int8-weight-only": "int8 weight-only", "int8-dynamic": "int8 dynamic"}


class LowRankLinear(nn.Module):
    """y = U (V x) + bias.

    Args:
        left: U, [out_features, rank].
        right: V, [rank, in_features].
        bias: [out_features], or None.

    Shape:
        input [..., in_features] -> output [..., out_features]
    """

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # called weight because model code reads the dtype of a layer's weight
        self.weight = nn.Parameter(left)
        self.low_rank_in = nn.Parameter(right)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both factors."""
        return linear(linear(x, self.low_rank_in), self.weight, self.bias)


class SparseLinear(nn.Module):
    """A dense product with a weight that is half zeros, which stay zeros when it is trained.

    Args:
        weight: [out_features, in_features].
        bias: [out_features], or None.

    Shape:
        input [..., in_features] -> output [..., out_features]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.weight.register_hook(lambda gradient: gradient * (self.weight != 0))
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the whole weight."""
        return linear(x, self.weight, self.bias)


def build_baselines(
    dense: Any, specs: Mapping[str, LayerSpec], rows: CalibrationRows | None, *, epochs: int = 0, seed: int = 0
) -> dict[str, tuple[Any, int]]:
    """Make the models of the other methods.

    Args:
        dense: the untouched model; it stays untouched.
        specs: layers that the conversion replaced.
        rows: the conversion's calibration rows, or None where it used none.
        epochs: passes over them that refine the blocks, as the conversion's.
        seed: of the refinement.

    Returns:
        Model and number of parameters in the replaced layers, by method.
    """
    dense = copy_sharing_tensors(dense)
    open_(dense)
    models = {method: copy_sharing_tensors(dense) for method in METHODS}
    parameters = dict.fromkeys(METHODS, 0)
    for name, statistics in _statistics(dense, specs, rows):
        module = dense.get_submodule(name)
        weight = (module.weight.t() if specs[name].fan_in_fan_out else module.weight).detach().float()
        bias = None if module.bias is None else module.bias.detach().float()
        left, right, svd_bias = whitened_svd(specs[name], weight, bias, statistics)
        pruned = keep_two_of_four(weight)
        pruned_bias = statistics.corrected_bias(weight, pruned, bias) if specs[name].bias else None
        replacements: dict[str, nn.Module] = {
            "svd": LowRankLinear(left, right, svd_bias),
            "2:4": SparseLinear(pruned, pruned_bias),
        }
        for method, layer in replacements.items():
            replace_module(models[method], name, layer.to(module.weight).eval())
        parameters["svd"] += sum(parameter.numel() for parameter in replacements["svd"].parameters())
        parameters["2:4"] += int((pruned != 0).sum()) + (0 if pruned_bias is None else len(pruned_bias))
    if epochs and rows is not None:
        batches = following_batches(rows, dense)
        for model in models.values():
            refine_model_(model, dense, list(specs), batches, epochs=epochs, seed=seed)
    return {method: (models[method], parameters[method]) for method in METHODS}


def build_int8(dense: Any) -> dict[str, Any]:
    """The untouched model in int8, by mode; it stays untouched.

    Raises:
        OptionError: when torchao is missing.
    """
    check_torchao()
    models = {}
    for mode in INT8_MODES:
        models[str(mode)] = copy_sharing_tensors(dense)
        quantize_linears_(models[mode], mode)
    return models


def keep_two_of_four(weight: Tensor) -> Tensor:
    """Zero the two smallest of every four neighbours along the inputs of weight [out_features, in_features]."""
    rows, columns = weight.shape
    # padding that can never be among the largest
    groups = pad(weight.abs(), (0, -columns % 4), value=-1.0).view(rows, -1, 4)
    mask = torch.zeros_like(groups).scatter_(-1, groups.topk(2, dim=-1).indices, 1.0)
    return weight * mask.view(rows, -1)[:, :columns]


def _statistics(
    dense: Any, specs: Mapping[str, LayerSpec], rows: CalibrationRows | None
) -> Iterator[tuple[str, ActivationStatistics]]:
    """Input statistics of every layer, on its device; runs the model once for as many layers as fit in the budget."""
    waiting = list(specs)
    while waiting:
        group: list[str] = []
        used = 0
        while waiting and (not group or used <= STATISTICS_BUDGET):
            group.append(waiting.pop(0))
            used += statistics_bytes(specs[group[-1]].design.in_features)
        experts = {name: specs[name].design.in_features for name in group if group_of(name)}
        gathered = {} if rows is None else collect(dense, group, rows.batches(rows.fitted, dense), experts=experts)
        for name in group:
            statistics = gathered.get(name)
            if statistics is None or not statistics.rows:
                statistics = ActivationStatistics.isotropic(specs[name].design.in_features)
            yield name, statistics.to(dense.device)
