"""The moments and output metrics of a chain's layers, gathered a block at a time.

One way up gathers what goes into the layers of every block, and keeps what goes into the blocks for the rows that weigh
outputs. One way down takes the gradients of the probes back through the blocks, each computed once more from what went into
it. What is in memory at a time is one block with the moments of its layers, and the hidden states in front of it; those in
front of all blocks are in a file where they are many. Its price is one more forward pass of the rows that weigh.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from spmconvert.calibrate.curvature import Curvatures
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import checked, recording
from spmconvert.calibrate.store import MomentStore
from spmconvert.model.chain import Chain, Walk
from spmconvert.model.states import STATES_LIMIT, States
from spmconvert.plan.plan import LayerPlan, statistics_groups


class BlockCalibration:
    """Calibration of some layers of a chain.

    Args:
        chain: the dense model.
        layers: by the position of the block that they are in.
        batches: keyword arguments of the model, by the part of the rows that they belong to.
        weighing: how many of the first fitted batches weigh outputs; 0 for no metrics.
        store: where moments are kept.
        report: told how many batches went through a block, and how many will.
        seed: seed of the probes.
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
    ) -> None:
        self._chain, self._layers, self._store, self._seed = chain, layers, store, seed
        self._weighing = batches["fitted"][:weighing]
        self._walks = {part: Walk(chain, given) for part, given in batches.items()}
        self._entering: dict[int, States] = {}
        self._first = min(layers)
        self._ticks = self._counted(report)

    def run(self) -> None:
        """Gather and store everything."""
        # without metrics nothing is wanted of what comes behind the last layer
        for index in range(len(self._chain) if self._weighing else max(self._layers) + 1):
            self._up(index)
        if not self._weighing:
            return
        curvatures = Curvatures(self._chain.model, self._names(), self._seed)
        gradients = self._probe(curvatures)
        for index in reversed(range(self._first, len(self._chain))):
            self._down(index, curvatures, gradients)

    def _counted(self, report: Callable[[int, int], None]) -> Iterator[None]:
        up = len(self._chain) if self._weighing else max(self._layers) + 1
        total = up * sum(map(len, self._walks.values())) + (len(self._chain) - self._first) * len(self._weighing)
        for done in range(1, total + 1):
            report(done, total)
            yield

    def _names(self) -> list[str]:
        return [layer.target.name for layers in self._layers.values() for layer in layers]

    @torch.no_grad()
    def _up(self, index: int) -> None:
        block, groups = self._chain.block(index), list(statistics_groups(self._layers.get(index, [])))
        if self._weighing and index >= self._first:
            states = [self._walks["fitted"].states[batch] for batch in range(len(self._weighing))]
            self._entering[index] = States(states, self._chain.folder, STATES_LIMIT // len(self._chain))
        for part, walk in self._walks.items():
            for group in groups[:-1]:
                self._record(part, walk, block, group, moves=False)
            self._record(part, walk, block, groups[-1] if groups else [], moves=True)
            walk.index += 1

    def _record(self, part: str, walk: Walk, block: torch.nn.Module, layers: Sequence[LayerPlan], *, moves: bool) -> None:
        inner = {layer.target.name: self._inner_name(walk.index, layer) for layer in layers}
        batch = 0
        with recording(block, list(inner.values()), lambda: walk.masks[batch]) as gathered:
            for batch in range(len(walk)):
                after = walk.run(block, batch)
                if moves:
                    walk.states[batch] = after
                    next(self._ticks)
        for name, inside in inner.items():
            statistics = checked(name, gathered.pop(inside, None))
            if part == "fitted" and self._weighing:
                self._store.prepare(name, statistics)
            else:
                self._store.write(name, part, statistics)

    def _inner_name(self, index: int, layer: LayerPlan) -> str:
        return layer.target.name.removeprefix(f"{self._chain.name(index)}.")

    def _probe(self, curvatures: Curvatures) -> States:
        """Gradients of the probes with respect to what the last block puts out."""
        chain, walk = self._chain, self._walks["fitted"]
        with chain.ending_in():
            curvatures.look_at(self._weighing[0])
        gradients = []
        for number, batch in enumerate(self._weighing):
            leaf = walk.states[number].requires_grad_()
            with chain.ending_in(leaf):
                curvatures.probe(batch)
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        return States(gradients, chain.folder)

    def _down(self, index: int, curvatures: Curvatures, gradients: States) -> None:
        block, walk = self._chain.block(index), self._walks["fitted"]
        inner = {self._inner_name(index, layer): layer.target.name for layer in self._layers.get(index, [])}
        walk.index = index
        for number, batch in enumerate(self._weighing):
            state = self._entering[index][number].requires_grad_()
            with curvatures.watching(block, inner, batch), torch.enable_grad():
                walk.run(block, number, state).backward(gradients[number])
            assert state.grad is not None
            gradients[number] = state.grad
            next(self._ticks)
        del self._entering[index]
        for name in inner.values():
            self._store.finish(name, OutputMetric.of(curvatures.result_of(name)))
