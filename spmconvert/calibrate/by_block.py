"""The moments and output metrics of a chain's layers, gathered a block at a time.

One way up gathers what goes into the layers of every block, and keeps what goes into the blocks for the rows that weigh
outputs. One way down takes the gradients of the probes back through the blocks, each computed once more from what went into
it. What is in memory at a time is one block with the moments of its layers, and the hidden states in front of it; those in
front of all blocks are in a file where they are many. Its price is one more forward pass of the rows that weigh.

Several processes divide the rows (``shares``), and the layers whose totals they keep.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from spmconvert.calibrate.curvature import Curvatures
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.shares import SHARES, SharedSums, Tensors, dealt
from spmconvert.calibrate.statistics import ActivationStatistics, checked, recording
from spmconvert.calibrate.store import MomentStore
from spmconvert.model.chain import Chain, Walk
from spmconvert.model.states import STATES_LIMIT, States
from spmconvert.plan.plan import LayerPlan, statistics_groups
from spmconvert.system.team import Team


class BlockCalibration:
    """Calibration of some layers of a chain.

    Args:
        chain: the dense model.
        layers: by the position of the block that they are in.
        batches: keyword arguments of the model, by the part of the rows that they belong to.
        weighing: how many of the first fitted batches weigh outputs; 0 for no metrics.
        store: where moments are kept.
        report: told how many of this process's batches went through a block, and how many will.
        seed: seed of the probes.
        team: who gathers; all of them do this at once.
    """

    def __init__(
        self,
        chain: Chain,
        layers: dict[int, list[LayerPlan]],
        batches: dict[str, list[dict[str, Any]]],
        weighing: int,
        store: MomentStore,
        report: Callable[[int, int], None],
        seed: int,
        team: Team,
    ) -> None:
        self._chain, self._layers, self._store, self._seed, self._team = chain, layers, store, seed, team
        self._first_batch = batches["fitted"][0]
        self._batch_rows = len(next(value for value in self._first_batch.values() if isinstance(value, Tensor)))
        self._parts = {part: _Part(chain, given, team) for part, given in batches.items()}
        self._is_weighed, self._weighing = weighing > 0, self._parts["fitted"].first(weighing)
        self._experts = [layer for own in layers.values() for layer in own if layer.target.group]
        self._expert_inputs = {layer.target.name: layer.target.in_features for layer in self._experts}
        self._entering: dict[int, States] = {}
        self._first = min(layers)
        self._ticks = self._counted(report)

    def run(self) -> None:
        """Gather and store everything."""
        # without metrics nothing is wanted of what comes behind the last layer
        for index in range(len(self._chain) if self._is_weighed else max(self._layers) + 1):
            self._up(index)
        if not self._is_weighed:
            return
        experts = {layer.target.name: layer.target.out_features for layer in self._experts}
        curvatures = Curvatures(self._chain.model, self._names(), self._seed, experts)
        gradients = self._probe(curvatures)
        for index in reversed(range(self._first, len(self._chain))):
            self._down(index, curvatures, gradients)

    def _counted(self, report: Callable[[int, int], None]) -> Iterator[None]:
        up = len(self._chain) if self._is_weighed else max(self._layers) + 1
        total = up * sum(len(part.walk) for part in self._parts.values())
        total += (len(self._chain) - self._first) * len(self._weighing)
        for done in range(1, total + 1):
            report(done, total)
            yield

    def _names(self) -> list[str]:
        return [layer.target.name for layers in self._layers.values() for layer in layers]

    @torch.no_grad()
    def _up(self, index: int) -> None:
        block, groups = self._chain.block(index), list(statistics_groups(self._layers.get(index, [])))
        if self._is_weighed and index >= self._first:
            states = [self._parts["fitted"].walk.states[batch] for batch, _ in self._weighing]
            self._entering[index] = States(states, self._chain.folder, STATES_LIMIT // len(self._chain))
        for name, part in self._parts.items():
            for group in groups[:-1]:
                self._record(name, part, block, group, moves=False)
            self._record(name, part, block, groups[-1] if groups else [], moves=True)
            part.walk.index += 1

    def _record(
        self, name: str, part: "_Part", block: torch.nn.Module, layers: Sequence[LayerPlan], *, moves: bool
    ) -> None:
        walk = part.walk
        inner = {self._inner_name(walk.index, layer): layer.target.name for layer in layers}
        sums = SharedSums(self._team, self._store.folder, name, _merged)
        for share, members in part.shares:
            batch = members[0]
            with recording(block, list(inner), lambda: walk.masks[batch]) as gathered:  # noqa: B023 - called in here
                for batch in members:
                    after = walk.run(block, batch)
                    if moves:
                        walk.states[batch] = after
                        next(self._ticks)
            for inside, statistics in gathered.items():
                sums.add(inner[inside], share, statistics.tensors)
        for layer, total in sums.take(list(inner.values())):
            statistics = checked(
                layer, None if total is None else ActivationStatistics.from_tensors(total), self._expert_inputs
            )
            if name == "fitted" and self._is_weighed:
                self._store.prepare(layer, statistics)
            else:
                self._store.write(layer, name, statistics)

    def _inner_name(self, index: int, layer: LayerPlan) -> str:
        return layer.target.name.removeprefix(f"{self._chain.name(index)}.")

    def _probe(self, curvatures: Curvatures) -> States:
        """Gradients of the probes with respect to what the last block puts out."""
        chain, part = self._chain, self._parts["fitted"]
        with chain.ending_in():
            curvatures.look_at(self._first_batch)
        gradients = States([part.walk.states[batch] for batch, _ in self._weighing], chain.folder)
        for place, (batch, number) in enumerate(self._weighing):
            leaf = part.walk.states[batch].detach().requires_grad_()
            with chain.ending_in(leaf):
                curvatures.probe(part.batches[batch], number * self._batch_rows)
            assert leaf.grad is not None
            gradients[place] = leaf.grad
        curvatures.positions = self._team.total(curvatures.positions)
        return gradients

    def _down(self, index: int, curvatures: Curvatures, gradients: States) -> None:
        block, part = self._chain.block(index), self._parts["fitted"]
        inner = {self._inner_name(index, layer): layer.target.name for layer in self._layers.get(index, [])}
        part.walk.index = index
        sums = SharedSums(self._team, self._store.folder, "curvature", _added)
        for share, members in groupby(enumerate(self._weighing), lambda item: item[1][1] % SHARES):
            for place, (batch, _) in members:
                state = self._entering[index][place].detach().requires_grad_()
                with curvatures.watching(block, inner, part.batches[batch]), torch.enable_grad():
                    part.walk.run(block, batch, state).backward(gradients[place])
                assert state.grad is not None
                gradients[place] = state.grad
                next(self._ticks)
            for name in inner.values():
                if (total := curvatures.take(name)) is not None:
                    sums.add(name, share, {"sum": total})
        del self._entering[index]
        for name, added in sums.take(list(inner.values())):
            self._store.finish(name, OutputMetric.of(curvatures.result_of(name, None if added is None else added["sum"])))


class _Part:
    """This process's batches of one part of the rows, share after share.

    Attributes:
        batches: keyword arguments of the model.
        walk: of these batches.
        shares: by share its number and the places of its batches among these.
    """

    def __init__(self, chain: Chain, batches: list[dict[str, Any]], team: Team) -> None:
        shares = dealt(len(batches), team)
        self._numbers = [number for _, members in shares for number in members]
        self.batches = [batches[number] for number in self._numbers]
        self.walk = Walk(chain, self.batches)
        places = iter(range(len(self._numbers)))
        self.shares = [(share, [next(places) for _ in members]) for share, members in shares]

    def first(self, count: int) -> list[tuple[int, int]]:
        """Place and number among all of those of its batches that are among the first so many of all."""
        return [(place, number) for place, number in enumerate(self._numbers) if number < count]


def _merged(total: Tensors, value: Tensors) -> Tensors:
    statistics = ActivationStatistics.from_tensors(total)
    statistics.merge_(ActivationStatistics.from_tensors(value))
    return statistics.tensors


def _added(total: Tensors, value: Tensors) -> Tensors:
    return {"sum": total["sum"].add_(value["sum"])}
