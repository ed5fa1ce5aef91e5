"""Find the designs of all layers for a budget without fitting what cannot win.

Low rank is known at every rank, so a first choice among it and forms of fixed size costs little. What each layer was given
there is what other forms (kinds of terms, alone or beside low rank) have to beat: they are tried at that cost on a few
layers of each shape, and only the best of those that win there go on to all layers of the shape. Then the choice is made
again, and the forms follow each layer to its new cost, until the choice no longer changes.

What it gives up: a form that wins at a cost at which it was never tried, in layers unlike those of the sample, or as the
second best of its shape.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from spmconvert.budget.allocation import Allocation, Limit, allocate
from spmconvert.budget.candidates import designs_of, standing_designs_of
from spmconvert.budget.curves import Curves, LayerCurve
from spmconvert.errors import OptionError
from spmconvert.operator.design import Design
from spmconvert.operator.terms.registry import term_class
from spmconvert.operator.terms.term import Term

# layers of a shape that forms are tried on first
SAMPLE = 2
# forms of a shape that go on to all of its layers, of those whose size is fixed and of those whose size is given
BEST_FORMS = 1
# choices that are made again with what the one before led to
ROUNDS = 3
# share of low rank's loss at the same cost that a form has to save on the sample in order to go on
LEAST_SAVING = 0.01
# a layer is tried again where its cost changed by more than this share
NEW_COST = 0.05

Forms = Mapping[str, Design]
# designs of a layer to be fitted
Trial = tuple[LayerCurve, Sequence[Design]]
FormsOf = Callable[[LayerCurve], Forms]


@dataclass(frozen=True)
class Search:
    """One search.

    Attributes:
        curves: what is known; it grows.
        limit: the budget.
        measure: fits and keeps designs of layers that are not known yet; they are known afterwards.
    """

    curves: Curves
    limit: Limit
    measure: Callable[[Sequence[Trial]], None]

    def run(self) -> Allocation:
        """Search until the choice no longer changes.

        Raises:
            OptionError: as ``allocate`` does.
        """
        winners: dict[tuple[int, int], list[str]] = {}
        if self._kinds:
            self._try(self._standing, self._winners(self._standing))
        given = self._first_costs()
        if self._kinds:
            at_first = self._forms_at(given)
            winners = self._winners(at_first)
            self._try(at_first, winners)
        allocation = allocate(self.curves, self.limit)
        for _ in range(ROUNDS if self._kinds else 0):
            now = self._costs(allocation)
            changed = [name for name, cost in now.items() if _is_new(given.get(name), cost)]
            if not changed:
                break
            given = {**given, **now}
            self._try(self._forms_at({name: given[name] for name in changed}), winners)
            allocation = allocate(self.curves, self.limit)
        return allocation

    @property
    def _kinds(self) -> list[str]:
        """Kinds that are tried."""
        return [kind for kind in self.curves.recipe.budget.structures if kind != "lowrank"]

    @property
    def _beside(self) -> bool:
        """Whether low rank stands beside them."""
        return "lowrank" in self.curves.recipe.budget.structures

    def _first_costs(self) -> dict[str, int]:
        """Parameters of every layer before other kinds are tried, by name; layers that stay dense have none."""
        if self._beside:
            try:
                return self._costs(allocate(self.curves, self.limit))
            except OptionError:
                # low rank does not reach the budget, or is slower than dense; others may do better
                if not self._kinds:
                    raise
        share = self.curves.recipe.budget.keep or 0.5
        return {curve.layer.target.name: int(share * _size(curve)) for curve in self.curves.layers}

    def _costs(self, allocation: Allocation) -> dict[str, int]:
        """Parameters that layers were given, by name, but for those that are best left as a form of fixed size is."""
        costs = {}
        for curve, picked in zip(self.curves.layers, allocation.picked, strict=True):
            if picked is not None:
                design = picked.design(*_sizes(curve))
                if not any(design.terms == (term,) for term in self._standing_terms(curve)):
                    costs[curve.layer.target.name] = design.parameter_count(bias=False)
        return costs

    def _standing_terms(self, curve: LayerCurve) -> list[Term]:
        return [term for kind in self._kinds for term in term_class(kind).standing_designs(*_sizes(curve))]

    def _standing(self, curve: LayerCurve) -> Forms:
        found = ((f"{kind} as it is", standing_designs_of(kind, *_sizes(curve))) for kind in self._kinds)
        return self._affordable(curve, found)

    def _forms_at(self, parameters: Mapping[str, int]) -> FormsOf:
        """Forms of a layer at its number of parameters; none for layers that are not named."""

        def forms(curve: LayerCurve) -> Forms:
            given = parameters.get(curve.layer.target.name)
            if given is None:
                return {}
            sizes = _sizes(curve)
            found = ((kind, designs_of(kind, *sizes, given, beside_low_rank=self._beside)) for kind in self._kinds)
            return self._affordable(curve, found)

        return forms

    def _affordable(self, curve: LayerCurve, found: Iterable[tuple[str, Sequence[Design]]]) -> Forms:
        """Forms of a layer that are no slower than the dense layer, where that matters; nothing has been fitted for it."""
        return {
            f"{name} {number}": design
            for name, designs in found
            for number, design in enumerate(designs)
            if not self.limit.drops(curve.layer, design)
        }

    def _winners(self, forms: FormsOf) -> dict[tuple[int, int], list[str]]:
        """By shape the forms that save most on its sample."""
        winners = {}
        samples = {
            shape: spread([curve for curve in members if forms(curve)], SAMPLE) for shape, members in self._shapes().items()
        }
        self.measure([(curve, list(forms(curve).values())) for curves in samples.values() for curve in curves])
        for shape, curves in samples.items():
            savings: dict[str, list[float]] = {}
            for curve in curves:
                for name, design in forms(curve).items():
                    savings.setdefault(name, []).append(self._saving(curve, design))
            means = {name: statistics.mean(values) for name, values in savings.items()}
            best = sorted((name for name in means if means[name] > LEAST_SAVING), key=means.__getitem__, reverse=True)
            winners[shape] = best[:BEST_FORMS]
        return winners

    def _try(self, forms: FormsOf, winners: Mapping[tuple[int, int], Sequence[str]]) -> None:
        """Measure the winning forms on all layers of their shapes."""
        trials: list[Trial] = []
        for curve in self.curves.layers:
            tried = forms(curve) if winners[_sizes(curve)] else {}
            trials.append((curve, [tried[name] for name in winners[_sizes(curve)] if name in tried]))
        self.measure(trials)

    def _saving(self, curve: LayerCurve, design: Design) -> float:
        """Share of the loss of low rank at the same cost that a design saves, by the limit by which it saves more."""
        return max(self._saving_by(limit, curve, design) for limit in self.limit.parts)

    @staticmethod
    def _saving_by(limit: Limit, curve: LayerCurve, design: Design) -> float:
        """By the costs of one limit; one where there is no low rank so small."""
        entries = tuple(design.to_json())
        cost = limit.cost(curve.layer, design)
        own, rivals = None, []
        for candidate in curve.candidates:
            if candidate.terms == entries:
                own = candidate.loss
            elif candidate.kinds == ("lowrank",) and limit.cost(curve.layer, candidate.design(*_sizes(curve))) <= cost:
                rivals.append(candidate.loss)
        assert own is not None
        return 1 - own / max(min(rivals), 1e-300) if rivals else 1.0

    def _shapes(self) -> dict[tuple[int, int], list[LayerCurve]]:
        shapes: dict[tuple[int, int], list[LayerCurve]] = {}
        for curve in self.curves.layers:
            shapes.setdefault(_sizes(curve), []).append(curve)
        return shapes


def spread(members: Sequence[LayerCurve], count: int) -> list[LayerCurve]:
    """At most ``count`` of the members, spread over all; ends are unlike the others, so they are not among a few."""
    if len(members) <= count:
        return list(members)
    return [members[int((step + 0.5) * len(members) / count)] for step in range(count)]


def _sizes(curve: LayerCurve) -> tuple[int, int]:
    return curve.layer.target.in_features, curve.layer.target.out_features


def _size(curve: LayerCurve) -> int:
    return curve.layer.target.in_features * curve.layer.target.out_features


def _is_new(before: int | None, now: int) -> bool:
    """Whether a layer's cost is another one."""
    return before is None or abs(now - before) > NEW_COST * before
