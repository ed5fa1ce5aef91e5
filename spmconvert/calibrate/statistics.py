"""Mean and centred second moment of what goes into each layer, gathered by hooks while the real model runs.

The fit only needs these two (see ``solve``), so the memory is in_features² numbers a layer, whatever the number of tokens.
Batches are combined by the pairwise update of Chan, Golub and LeVeque (1979): centring happens inside every batch, so the
result does not depend on how rows are split over batches or processes except for rounding, and a large mean does not
cancel the variance. What it gives up: everything above second order.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from spmconvert.errors import CalibrationError
from spmconvert.model.architecture import runs_on
from spmconvert.model.opened_module import OpenedModule, Routed
from spmconvert.operator.factors import gram


@dataclass
class ActivationStatistics:
    """Moments of the inputs of one layer.

    Attributes:
        rows: number of input vectors seen.
        mean: [in_features], float32.
        scatter: sum over rows of (x - mean)(x - mean)ᵀ, [in_features, in_features], float32.
    """

    rows: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> "ActivationStatistics":
        """Statistics of no rows."""
        mean = torch.zeros(in_features, dtype=torch.float32, device=device)
        return cls(0, mean, torch.zeros(in_features, in_features, dtype=torch.float32, device=device))

    @classmethod
    def isotropic(cls, in_features: int) -> "ActivationStatistics":
        """What stands in for data when there is none: zero mean, unit covariance, so the fit is in the Frobenius norm."""
        return cls(1, torch.zeros(in_features, dtype=torch.float32), torch.eye(in_features, dtype=torch.float32))

    @classmethod
    def of(cls, x: Tensor) -> "ActivationStatistics":
        """Statistics of the rows of x [rows, in_features]."""
        x = x.detach().float()
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        return cls(len(x), mean, gram(x - mean))

    @property
    def covariance(self) -> Tensor:
        """Centred second moment, [in_features, in_features]."""
        return self.scatter / max(self.rows, 1)

    def uncentred(self) -> "ActivationStatistics":
        """The same rows with their mean as part of the second moment: what a layer without a bias is fitted to."""
        scatter = self.scatter + self.rows * torch.outer(self.mean, self.mean)
        return ActivationStatistics(self.rows, torch.zeros_like(self.mean), scatter)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ActivationStatistics":
        """What ``tensors`` gave."""
        return cls(int(tensors["rows"]), tensors["mean"], tensors["scatter"])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The same as tensors by name, to be kept in a file."""
        return {"rows": torch.tensor(self.rows), "mean": self.mean, "scatter": self.scatter}

    def of_rows(self, rows: int) -> "ActivationStatistics":
        """Statistics of so many rows with the same moments."""
        return ActivationStatistics(rows, self.mean.clone(), self.covariance * rows)

    def to(self, device: torch.device | str) -> "ActivationStatistics":
        """The same on another device."""
        return ActivationStatistics(self.rows, self.mean.to(device), self.scatter.to(device))

    def corrected_bias(self, weight: Tensor, replacement: Tensor, bias: Tensor | None) -> Tensor:
        """The bias b + (W - S) mean, with which S in the place of W keeps the mean output exact; float32."""
        shift = (weight.float() - replacement) @ self.mean
        return shift if bias is None else shift + bias.float()

    def merge_(self, other: "ActivationStatistics") -> None:
        """Add the rows of other statistics, in place; the same result as seeing all rows at once."""
        total = self.rows + other.rows
        if total == 0:
            return
        difference = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(difference, difference, alpha=self.rows * other.rows / total)
        self.mean += difference * (other.rows / total)
        self.rows = total


@contextmanager
def recording(
    model: nn.Module, names: Sequence[str], mask: Callable[[], Tensor | None]
) -> Iterator[dict[str, ActivationStatistics]]:
    """Record the inputs of the named layers while the block runs.

    Args:
        model: the model that will be called inside the block.
        names: module names of layers whose first argument is [..., in_features].
        mask: gives the attention mask [rows, tokens] of the running batch, or None when every token counts.

    Yields:
        Statistics by layer name, on the CPU, filled while the model runs.
    """
    with routing(model, names) as routed:
        recorder = _Recorder(mask, routed)
        handles = [model.get_submodule(name).register_forward_pre_hook(partial(recorder.record, name)) for name in names]
        try:
            yield recorder.gathered
        finally:
            for handle in handles:
                handle.remove()


class _Recorder:
    """Adds up what goes into layers; one that is called with the tensor of the call before it computes nothing anew."""

    def __init__(self, mask: Callable[[], Tensor | None], routed: Callable[[str], Routed | None]) -> None:
        self.gathered: dict[str, ActivationStatistics] = {}
        self.mask, self.routed = mask, routed
        self.last: tuple[TensorWeakRef, int, ActivationStatistics] | None = None

    def record(self, name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        batch = self._statistics(arguments[0], self.routed(name))
        if name not in self.gathered:
            self.gathered[name] = ActivationStatistics.empty(len(batch.mean))
        self.gathered[name].merge_(batch)

    def _statistics(self, inputs: Tensor, routed: Routed | None) -> ActivationStatistics:
        if self.last is None or self.last[0]() is not inputs or self.last[1] != inputs._version:
            batch = ActivationStatistics.of(attended(inputs, self.mask(), routed)).to("cpu")
            self.last = (TensorWeakRef(inputs), inputs._version, batch)
        return self.last[2]


@contextmanager
def routing(model: nn.Module, names: Sequence[str]) -> Iterator[Callable[[str], Routed | None]]:
    """Tell which tokens a layer of the model is given, while it is called; None for all, or where that is not known."""
    modules = dict(model.named_modules())
    owners = {name: modules.get(name.rpartition(".")[0].rpartition(".")[0]) for name in names}
    opened = {name: owner for name, owner in owners.items() if isinstance(owner, OpenedModule)}
    handles = [
        handle
        for name, module in modules.items()
        if module in opened.values() and isinstance(module, OpenedModule)
        for handle in module.watch(modules[name.rpartition(".")[0]])
    ]
    try:
        yield lambda name: opened[name].routed if name in opened else None
    finally:
        for handle in handles:
            handle.remove()


def attended(x: Tensor, mask: Tensor | None, routed: Routed | None = None) -> Tensor:
    """Rows of x [..., in_features] that are not padding; layers off the masked sequence count in full.

    Args:
        x: what goes into a layer, or comes out of it.
        mask: [rows, tokens], or None when every token counts.
        routed: which tokens the rows are; None for all in order.
    """
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or mask.numel() != (len(rows) if routed is None else routed.tokens):
        return rows
    kept = mask.reshape(-1).bool().to(rows.device)
    return rows[kept if routed is None else kept[routed.positions]]


def collect(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[dict[str, Any]],
    step: Callable[[dict[str, Any]], None] | None = None,
    experts: Mapping[str, int] | None = None,
) -> dict[str, ActivationStatistics]:
    """Run the model over batches of keyword arguments and return the statistics of the named layers.

    Where all layers are in the base model only that is run: the logits of a large vocabulary would be the largest tensor.

    Args:
        model: that is run.
        names: layers.
        batches: keyword arguments.
        step: runs the model on a batch where more is to come of it than statistics; None runs it without gradients.
        experts: in_features by name of the layers that need not run.

    Raises:
        CalibrationError: when a layer never ran, or its inputs are not finite.
    """
    current: dict[str, Tensor | None] = {"mask": None}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    inside = len(prefix) > 1 and all(name.startswith(prefix) for name in names)
    runner = model.get_submodule(prefix[:-1]) if inside else model
    # of blocks that are recomputed and others a student has both
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), recording(model, names, lambda: current["mask"]) as gathered:
            for batch in batches:
                current["mask"] = batch.get("attention_mask")
                if step is None:
                    with runs_on(model, batch):
                        runner(**batch)
                else:
                    step(batch)
    finally:
        for module, training in before.items():
            module.training = training
    return {name: checked(name, gathered.get(name), experts) for name in names}


def checked(
    name: str, gathered: ActivationStatistics | None, experts: Mapping[str, int] | None = None
) -> ActivationStatistics:
    """What was gathered of a layer.

    Args:
        name: of the layer.
        gathered: None for nothing.
        experts: in_features by name of the layers of which that may be nothing.

    Raises:
        CalibrationError: when that is nothing, or its inputs are not finite.
    """
    if gathered is None and experts and name in experts:
        return ActivationStatistics.empty(experts[name])
    if gathered is None:
        raise CalibrationError(f"layer {name} never ran on the calibration rows; leave it out with --ignore {name}")
    if not gathered.scatter.isfinite().all():
        raise CalibrationError.not_finite(f"inputs of layer {name}", name)
    return gathered
