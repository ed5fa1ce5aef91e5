"""What the experts of a layer see together.

Routing is uneven, and a calibration text short: an expert may have seen fewer tokens than its inputs have features, or
none. Its moments are drawn towards these then (``Moments.drawn_towards``).
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.calibrate.store import PARTS, MomentStore
from spmconvert.errors import CalibrationError
from spmconvert.plan.plan import LayerPlan


def pool_experts(store: MomentStore, layers: Iterable[LayerPlan]) -> None:
    """Keep what every group of experts sees together, under its name, where it is not kept yet.

    Raises:
        CalibrationError: when no token of some part of the rows came to any of a group.
    """
    groups: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        if layer.target.group:
            groups.setdefault(layer.target.group, []).append(layer)
    for group, members in groups.items():
        if group not in store:
            _pool(store, group, members)


def _pool(store: MomentStore, group: str, members: Sequence[LayerPlan]) -> None:
    target = members[0].target
    statistics = {part: ActivationStatistics.empty(target.in_features) for part in PARTS}
    curvature: Tensor | None = None
    gathered: set[str] = set()
    for member in members:
        own = store.own(member.target.name)
        for part in PARTS:
            if (found := getattr(own, part)) is not None:
                statistics[part].merge_(found)
                gathered.add(part)
        if own.metric is not None:
            curvature = own.metric.matrix() if curvature is None else curvature.add_(own.metric.matrix())
    if not statistics["fitted"].rows:
        raise CalibrationError(f"no calibration token came to the experts of {group}; leave them out with --ignore")
    # the fitted part comes last: it says that all is there
    for part in sorted(gathered - {"fitted"}):
        if not statistics[part].rows:
            raise CalibrationError(
                f"none of the {part.replace('_', ' ')} rows' tokens came to the experts of {group}; give more calibration "
                "rows, or leave them out with --ignore"
            )
        store.write(group, part, statistics[part])
    store.write(group, "fitted", statistics["fitted"], None if curvature is None else OutputMetric.of(curvature))
