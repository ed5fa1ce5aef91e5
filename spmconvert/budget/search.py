"""Find the designs of all layers for a budget without fitting what cannot win.

Low rank is known at every rank, so a first choice costs nothing. What each layer was given there is what other kinds of
terms have to beat: they are tried at that cost, on a few layers of each shape first, and only kinds that win there go on
to all layers of the shape. Then the choice is made again, until it no longer changes. Kinds whose size is fixed are tried
as they are.

What it gives up: a kind that wins at a cost at which it was never tried, and in layers unlike those of the sample.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from spmconvert.budget.allocation import Allocation, Limit, allocate
from spmconvert.budget.candidates import Candidate, designs_of, standing_designs_of
from spmconvert.budget.curves import Curves, LayerCurve, SubjectOf
from spmconvert.errors import OptionError
from spmconvert.operator.design import Design

# layers of a shape that kinds are tried on first: the first, the last, and between
SAMPLE = 3
# choices that are made again with what the one before led to
ROUNDS = 3
# share of low rank's loss at the same cost that a design has to save in order to go on
LEAST_SAVING = 0.01


@dataclass(frozen=True)
class Search:
    """One search.

    Attributes:
        curves: what is known; it grows.
        limit: the budget.
        subject: gives a layer to fit candidates of.
        report: told how many layers are through, and of how many.
    """

    curves: Curves
    limit: Limit
    subject: SubjectOf
    report: Callable[[str, int, int], None]

    def run(self) -> Allocation:
        """Search until the choice no longer changes.

        Raises:
            OptionError: as ``allocate`` does.
        """
        self._try(lambda curve: self._standing(curve))
        given = self._first_costs()
        allocation = None
        for _ in range(ROUNDS if self._kinds else 1):
            if given is not None:
                sizes = dict(zip((id(curve) for curve in self.curves.layers), given, strict=True))
                self._try(lambda curve, sizes=sizes: self._at(curve, sizes[id(curve)]))  # type: ignore[misc]
            allocation = allocate(self.curves, self.limit)
            now = [
                self._parameters(curve, picked) for curve, picked in zip(self.curves.layers, allocation.picked, strict=True)
            ]
            if now == given:
                break
            given = now
        assert allocation is not None
        return allocation

    @property
    def _kinds(self) -> list[str]:
        """Kinds that are tried."""
        return [kind for kind in self.curves.recipe.budget.structures if kind != "lowrank"]

    @property
    def _beside(self) -> bool:
        """Whether low rank stands beside them."""
        return "lowrank" in self.curves.recipe.budget.structures

    def _first_costs(self) -> list[int | None] | None:
        """Parameters of every layer before other kinds are tried."""
        if self._beside:
            try:
                first = allocate(self.curves, self.limit)
            except OptionError:
                # low rank does not reach the budget, or is slower than dense; others may do better
                pass
            else:
                return [self._parameters(*pair) for pair in zip(self.curves.layers, first.picked, strict=True)]
        share = self.curves.recipe.budget.keep or 0.5
        return [
            int(share * curve.layer.target.in_features * curve.layer.target.out_features) for curve in self.curves.layers
        ]

    def _parameters(self, curve: LayerCurve, picked: Candidate | None) -> int | None:
        if picked is None:
            return None
        return picked.design(curve.layer.target.in_features, curve.layer.target.out_features).parameter_count(bias=False)

    def _standing(self, curve: LayerCurve) -> dict[str, list[Design]]:
        sizes = (curve.layer.target.in_features, curve.layer.target.out_features)
        return {kind: standing_designs_of(kind, *sizes, beside_low_rank=self._beside) for kind in self._kinds}

    def _at(self, curve: LayerCurve, parameters: int | None) -> dict[str, list[Design]]:
        if parameters is None:
            return {}
        sizes = (curve.layer.target.in_features, curve.layer.target.out_features)
        return {kind: designs_of(kind, *sizes, parameters, beside_low_rank=self._beside) for kind in self._kinds}

    def _try(self, designs: Callable[[LayerCurve], dict[str, list[Design]]]) -> None:
        """Try designs on a sample of every shape, and those of winning forms on all layers of the shape."""
        done = 0
        for members in self._shapes():
            sample = spread(members, SAMPLE)
            winners: set[str] = set()
            for curve in sample:
                tried = [design for found in designs(curve).values() for design in self._affordable(found)]
                self.curves.measure(curve, tried, self.subject)
                winners |= {form(design) for design in tried if self._wins(curve, design)}
            for curve in members:
                if winners and curve not in sample:
                    tried = [design for found in designs(curve).values() for design in self._affordable(found)]
                    self.curves.measure(curve, [design for design in tried if form(design) in winners], self.subject)
                done += 1
                self.report(curve.layer.target.name, done, len(self.curves.layers))

    def _affordable(self, designs: Iterable[Design]) -> list[Design]:
        """Designs that are no slower than the dense layer, where that matters; nothing has been fitted for it."""
        return [design for design in designs if not self.limit.drops(design)]

    def _wins(self, curve: LayerCurve, design: Design) -> bool:
        """Whether a design loses less than low rank of the same cost."""
        entries = tuple(design.to_json())
        candidates = curve.candidates
        own = next(candidate.loss for candidate in candidates if candidate.terms == entries)
        cost = self.limit.cost(curve.layer, design)
        sizes = (design.in_features, design.out_features)
        rivals = [
            candidate.loss
            for candidate in candidates
            if candidate.kinds == ("lowrank",) and self.limit.cost(curve.layer, candidate.design(*sizes)) <= cost
        ]
        return not rivals or own < (1 - LEAST_SAVING) * min(rivals)

    def _shapes(self) -> list[list[LayerCurve]]:
        shapes: dict[tuple[int, int], list[LayerCurve]] = {}
        for curve in self.curves.layers:
            shapes.setdefault((curve.layer.target.in_features, curve.layer.target.out_features), []).append(curve)
        return list(shapes.values())


def form(design: Design) -> str:
    """What a design is but for its sizes: kinds of terms, and which share low rank has of them."""
    low_rank = design.term("lowrank")
    share = 0.0 if low_rank is None else low_rank.parameter_count() / design.parameter_count(bias=False)
    return f"{'+'.join(term.kind for term in design.terms)} {share:.1f}"


def spread(members: Sequence[LayerCurve], count: int) -> list[LayerCurve]:
    """At most ``count`` of the members, the first and the last among them."""
    if len(members) <= count:
        return list(members)
    return [members[round(step * (len(members) - 1) / (count - 1))] for step in range(count)]
