"""What calibration rows say about layers: input moments on each part of the rows, and output metrics.

One run over the rows serves everything that asks for moments: curves, designs and final fits. It goes a block at a time
where the layers are in a chain of blocks (``by_block``), and through the whole model in memory where they are not.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from spmconvert.calibrate.by_block import BlockCalibration
from spmconvert.calibrate.curvature import Curvatures
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.pooling import pool_experts
from spmconvert.calibrate.statistics import ActivationStatistics, collect
from spmconvert.calibrate.store import PARTS, MomentStore
from spmconvert.data.calibration import CalibrationRows
from spmconvert.data.rows import Row
from spmconvert.model.chain import Chain, common_list
from spmconvert.model.loading import in_float32
from spmconvert.outputs.objective import objective_for
from spmconvert.plan.plan import LayerPlan, statistics_groups
from spmconvert.system.team import ALONE, Team

# tokens of a backward pass: what it keeps of every layer is the largest thing in memory
GRADIENT_TOKENS = 256
# the same where it goes through one block
BLOCK_GRADIENT_TOKENS = 1024
# positions that weigh outputs where each has a word or class of its own; with one probe a row, all rows do
WEIGHING_POSITIONS = 8192


def gather_moments(
    model: Callable[[], Any],
    layers: Sequence[LayerPlan],
    rows: CalibrationRows,
    store: MomentStore,
    report: Callable[[int, int], None],
    *,
    chain: Callable[[], Chain | None] = lambda: None,
    weighted: bool = False,
    seed: int = 0,
    team: Team = ALONE,
) -> None:
    """Run the calibration rows through the model and keep the moments of all layers that are not kept yet.

    Args:
        model: gives the dense model, where anything is missing and there is no chain.
        layers: whose inputs are wanted.
        rows: of the calibration text.
        store: where moments are kept.
        report: told how far it is, and of how much: rows, or batches in a block.
        chain: gives the blocks that all layers are in; None where they are in no chain.
        weighted: measure what errors of the outputs cost, too; takes a backward pass over the fitted rows.
        seed: seed of that measurement.
        team: who gathers, all of them at once; of a model that is no chain the first alone.
    """
    missing = [layer for layer in layers if layer.target.name not in store]
    blocks = chain() if missing else None
    if blocks is not None:
        _gather_by_block(blocks, missing, rows, store, report, weighted=weighted, seed=seed, team=team)
    elif team.leads:
        _gather_whole(model, layers, rows, store, report, weighted=weighted, seed=seed)
    if team.leads:
        pool_experts(store, layers)


def _gather_whole(
    model: Callable[[], Any],
    layers: Sequence[LayerPlan],
    rows: CalibrationRows,
    store: MomentStore,
    report: Callable[[int, int], None],
    *,
    weighted: bool,
    seed: int,
) -> None:
    groups = [
        group
        for group in statistics_groups(layers, weighted=weighted)
        if any(layer.target.name not in store for layer in group)
    ]
    total = len(groups) * sum(len(getattr(rows, part)) for part in PARTS)
    done = 0

    def counted(part: list[Row], size: int) -> Iterator[dict[str, Any]]:
        nonlocal done
        for first in range(0, len(part), size):
            yield next(rows.batches(part[first : first + size], model()))
            done += len(part[first : first + size])
            report(done, total)

    for group in groups:
        names, experts = [layer.target.name for layer in group], _experts(group, "in_features")
        for part in ("choosing", "held_out"):
            drawn = getattr(rows, part)
            if drawn:
                for name, statistics in collect(model(), names, counted(drawn, rows.batch_size), experts=experts).items():
                    store.write(name, part, statistics)
        for name, statistics, metric in _fitted(model(), group, rows, counted, weighted=weighted, seed=seed):
            store.write(name, "fitted", statistics, metric)


def _gather_by_block(
    chain: Chain,
    layers: Sequence[LayerPlan],
    rows: CalibrationRows,
    store: MomentStore,
    report: Callable[[int, int], None],
    *,
    weighted: bool,
    seed: int,
    team: Team,
) -> None:
    found = common_list(chain.model, [layer.target.name for layer in layers])
    assert found is not None
    by_block: dict[int, list[LayerPlan]] = {}
    for layer in layers:
        by_block.setdefault(found[1][layer.target.name], []).append(layer)
    longest = max(len(row) for row in rows.fitted)
    size = min(rows.batch_size, max(1, BLOCK_GRADIENT_TOKENS // longest)) if weighted else rows.batch_size
    drawn = {part: getattr(rows, part) for part in ("choosing", "held_out") if getattr(rows, part)}
    batches = {part: list(rows.batches(given, chain.model)) for part, given in drawn.items()}
    batches["fitted"] = list(rows.batches(rows.fitted, chain.model, size=size))
    weighing = -(-_weighing_rows(chain.model, rows) // size) if weighted else 0
    BlockCalibration(chain, by_block, batches, weighing, store, report, seed, team).run()


def _weighing_rows(model: Any, rows: CalibrationRows) -> int:
    """How many of the fitted rows weigh outputs."""
    if objective_for(model.config, type(model).__name__) != "logits":
        return len(rows.fitted)
    longest = max(len(row) for row in rows.fitted)
    return min(len(rows.fitted), max(1, WEIGHING_POSITIONS // longest))


def _experts(layers: Sequence[LayerPlan], size: str) -> dict[str, int]:
    """A size of the layers of experts by name: no token need come to them."""
    return {layer.target.name: getattr(layer.target, size) for layer in layers if layer.target.group}


def _fitted(
    model: Any,
    layers: Sequence[LayerPlan],
    rows: CalibrationRows,
    counted: Callable[[list[Row], int], Iterator[dict[str, Any]]],
    *,
    weighted: bool,
    seed: int,
) -> Iterator[tuple[str, ActivationStatistics, OutputMetric | None]]:
    """Moments on the fitted rows, with metrics from the same run."""
    names, experts = [layer.target.name for layer in layers], _experts(layers, "in_features")
    if not weighted:
        for name, statistics in collect(model, names, counted(rows.fitted, rows.batch_size), experts=experts).items():
            yield name, statistics, None
        return
    longest = max(len(row) for row in rows.fitted)
    size = min(rows.batch_size, max(1, GRADIENT_TOKENS // longest))
    weighing = _weighing_rows(model, rows)
    # gradients of a model in half precision round to nothing where they are small
    with in_float32(model):
        curvatures = Curvatures(model, names, seed, _experts(layers, "out_features"))
        curvatures.look_at(next(rows.batches(rows.fitted[:1], model)))
        gathered = collect(model, names, counted(rows.fitted[:weighing], size), curvatures.add, experts)
        found = curvatures.result()
    if others := rows.fitted[weighing:]:
        for name, statistics in collect(model, names, counted(others, rows.batch_size), experts=experts).items():
            gathered[name].merge_(statistics)
    for name in names:
        yield name, gathered.pop(name), OutputMetric.of(found.pop(name))
