"""The four ways to fill the same network with linear layers."""

from collections.abc import Callable
from functools import partial

from torch import nn

from spmconvert.operator.linear import SPMLinear

MakeLinear = Callable[[int, int], nn.Module]
MakeModel = Callable[[int, MakeLinear], nn.Module]

DENSE = "dense"
NARROW = "dense, equal size"
GENERAL = "SPM general"
ROTATION = "SPM rotation"

LINEARS: dict[str, MakeLinear] = {
    DENSE: nn.Linear,
    NARROW: nn.Linear,
    GENERAL: SPMLinear,
    ROTATION: partial(SPMLinear, variant="rotation"),
}


def parameters(model: nn.Module) -> int:
    """Number of trained parameters, biases, embeddings and head included."""
    return sum(parameter.numel() for parameter in model.parameters())


def hidden_width(build: MakeModel, width: int, structure: str, granularity: int) -> int:
    """The network's hidden width: the given one, or the largest at which a dense network is no larger than the SPM one."""
    if structure != NARROW:
        return width
    limit = parameters(build(width, LINEARS[GENERAL]))
    fitting = [
        hidden
        for hidden in range(granularity, width + 1, granularity)
        if parameters(build(hidden, LINEARS[NARROW])) <= limit
    ]
    return max(fitting, default=granularity)
