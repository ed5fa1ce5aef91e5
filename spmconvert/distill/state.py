"""Where a training run stands: what a checkpoint holds, and how it goes into and comes out of one.

A snapshot is whole tensors on the CPU, also where the parameters are sharded over processes, so that a run can go on with
another number of processes. Everything that decides about the next step is in it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import TypedDict

from spmconvert.checkpoint.places import STATE_FILE
from spmconvert.errors import CorruptCheckpointError


@dataclass
class State:
    """Where a run stands.

    Attributes:
        step: steps done.
        planned: steps of the whole run; 0 before they are planned.
        tokens: positions trained on, over all processes.
        matched: converted layers that the layerwise stage has done.
        history: one record a measurement.
        curve: mean training loss of every step.
        best_loss: lowest held-out loss.
        best: trained parameters at that point.
        average: their moving average, empty where none is kept.
        stopped: why the run ended early, or an empty string.
    """

    step: int = 0
    planned: int = 0
    tokens: int = 0
    matched: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    best_loss: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    stopped: str = ""

    def offer(self, loss: float, trained: dict[str, nn.Parameter]) -> None:
        """Keep the parameters if their held-out loss is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update_average(self, trained: dict[str, nn.Parameter], decay: float) -> None:
        """Move the average towards the parameters; it starts at the first ones it is given."""
        if not decay:
            return
        if not self.average:
            self.average = {name: parameter.detach().clone() for name, parameter in trained.items()}
        # a short memory at first, so that the start does not linger
        rate = max(1 - decay, 1 / (self.step + 1))
        for name, parameter in trained.items():
            self.average[name].lerp_(parameter.detach(), rate)

    @contextmanager
    def averaged(self, trained: dict[str, nn.Parameter]) -> Iterator[None]:
        """Have the average in the parameters' place for a while."""
        if not self.average:
            yield
            return
        parameters = {name: parameter.detach().clone() for name, parameter in trained.items()}
        _assign(trained, self.average)
        try:
            yield
        finally:
            _assign(trained, parameters)


_EXACT = ConfigDict(arbitrary_types_allowed=True, extra="forbid")


@with_config(_EXACT)
class _Values(TypedDict):
    step: Annotated[int, Field(ge=0)]
    planned: Annotated[int, Field(ge=0)]
    tokens: Annotated[int, Field(ge=0)]
    matched: Annotated[int, Field(ge=0)]
    history: list[dict[str, Any]]
    curve: list[float]
    best_loss: float
    best: dict[str, Tensor]
    average: dict[str, Tensor]
    stopped: str


@with_config(_EXACT)
class _Snapshot(TypedDict):
    state: _Values
    parameters: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] | None


# what the file of a snapshot has to be
_FORM: TypeAdapter[_Snapshot] = TypeAdapter(_Snapshot)


def snapshot(state: State, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Everything a run needs to go on, as whole CPU tensors; all processes have to call it.

    Args:
        state: where the run stands.
        trained: its parameters by name.
        optimizer: its optimizer; None before there is one.
    """
    values = {**vars(state), "best": _whole(state.best), "average": _whole(state.average)}
    moments = None if optimizer is None else {i: _whole(moment) for i, moment in _moments(optimizer, trained).items()}
    return {"state": values, "parameters": _whole(trained), "moments": moments}


def read_snapshot(file: Any) -> dict[str, Any]:
    """A snapshot as a run has kept it.

    Args:
        file: its path, or a stream of its bytes.

    Raises:
        CorruptCheckpointError: when it is damaged.
    """
    try:
        return _FORM.dump_python(_FORM.validate_python(torch.load(file, weights_only=True)))
    except Exception as error:
        # whatever torch, its unpickler and the archive in the file raise
        raise CorruptCheckpointError(
            f"{STATE_FILE} of the unfinished run is damaged; discard the run with --force"
        ) from error


def restore(
    earlier_snapshot: dict[str, Any],
    state: State,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Put a snapshot back; with an optimizer also its moments.

    Raises:
        CorruptCheckpointError: when it is of other parameters.
    """
    _check_parameters(earlier_snapshot, trained)
    vars(state).update(earlier_snapshot["state"])
    for values in (state.best, state.average):
        for name, value in values.items():
            values[name] = _like(value, trained[name])
    _assign(trained, earlier_snapshot["parameters"])
    if optimizer is None or earlier_snapshot["moments"] is None:
        return
    for name, parameter in trained.items():
        optimizer.state[parameter] = {
            key: _like(value, parameter) if value.shape == parameter.shape else value.clone()
            for key, value in earlier_snapshot["moments"][name].items()
        }


def _check_parameters(found: dict[str, Any], trained: dict[str, nn.Parameter]) -> None:
    moments = {} if found["moments"] is None else found["moments"]
    held = [found["parameters"], *(found["state"].get(name, {}) for name in ("best", "average"))]
    fits = all(set(values) <= set(trained) for values in (*held, moments)) and set(found["parameters"]) == set(trained)
    fits = fits and all(value.shape == trained[name].shape for values in held for name, value in values.items())
    if not fits or (found["moments"] is not None and set(moments) != set(trained)):
        raise CorruptCheckpointError(
            f"{STATE_FILE} of the unfinished run is of other parameters; discard the run with --force"
        )


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its shards, on the CPU; all processes have to call it."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def _whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in tensors.items()}


def _moments(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    return {name: dict(optimizer.state[parameter]) for name, parameter in trained.items()}


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, copy=True)


@torch.no_grad()
def _assign(trained: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in trained.items():
        value = values[name]
        parameter.copy_(value if isinstance(value, DTensor) else _like(value, parameter))
