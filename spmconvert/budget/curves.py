"""What every layer loses by every design that has been measured, as far as it is known, and where it is kept.

Low rank is known at every rank from one decomposition. Other designs are fitted one by one, where a search asks for them
(``search``), and kept for every later budget.

On a GPU designs of one shape are fitted in batches (``fit/batches``), so the last digits of a loss depend on what it was
fitted beside: on what was known before, and on the memory that was free.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from spmconvert.budget.cache import LOW_RANK, RESPONSE, TERMS, CacheIdentity, CurveCache, read_part, write_part
from spmconvert.budget.candidates import Candidate, Subject, measure_together
from spmconvert.budget.lowrank import LowRankCurve, low_rank_curve
from spmconvert.budget.response import Response, between, measured_sample
from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.errors import OptionError
from spmconvert.operator.design import Design
from spmconvert.plan.plan import ConversionPlan, LayerPlan
from spmconvert.recipe.recipe import Recipe

SubjectOf = Callable[[LayerPlan], Subject]


@dataclass
class LayerCurve:
    """What is known about one layer.

    Attributes:
        layer: the planned layer.
        low_rank: by rank, or None where low rank is no structure of the recipe.
        terms: designs that were fitted.
        response: how the model answers to errors, or None where losses are taken as predicted.
    """

    layer: LayerPlan
    low_rank: LowRankCurve | None
    terms: list[Candidate] = field(default_factory=list)
    response: Response | None = None

    @property
    def candidates(self) -> list[Candidate]:
        """Everything that is known, with losses as the model responds."""
        found = list(self.terms)
        if self.low_rank is not None:
            curve = self.low_rank
            for rank, error, loss in zip(curve.ranks, curve.errors, curve.losses, strict=True):
                found.append(Candidate(({"kind": "lowrank", "rank": rank},), error, loss))
        if self.response is None:
            return found
        return [replace(candidate, loss=self.response.loss(candidate.loss)) for candidate in found]

    def knows(self, design: Design) -> bool:
        """Whether a design was fitted already."""
        entries = tuple(design.to_json())
        return any(candidate.terms == entries for candidate in self.terms)


@dataclass
class Curves:
    """Curves of all planned layers, in the order of the model.

    Attributes:
        plan: the layers.
        recipe: how they are measured.
        cache: where they are kept.
        layers: by layer.
    """

    plan: ConversionPlan
    recipe: Recipe
    cache: CurveCache
    layers: list[LayerCurve]

    @property
    def candidates(self) -> tuple[tuple[Candidate, ...], ...]:
        """By layer."""
        return tuple(tuple(curve.candidates) for curve in self.layers)

    def read_again(self) -> None:
        """Take over what others have kept meanwhile."""
        for curve in self.layers:
            found = _known(self.cache, curve.layer)
            curve.low_rank, curve.terms = found.low_rank, found.terms
            # one that lies between measured ones is kept nowhere
            curve.response = found.response or curve.response


def check_measurable(recipe: Recipe) -> None:
    """Refuse a budget that needs calibration rows and has none.

    Raises:
        OptionError: when it does.
    """
    if recipe.calibration.file is None and recipe.budget.sensitivity != "none":
        raise OptionError(
            f"sensitivity {recipe.budget.sensitivity} is measured on calibration rows; give --calib FILE, or "
            "--sensitivity none"
        )


def known_curves(
    source: Checkpoint, plan: ConversionPlan, recipe: Recipe, identity: CacheIdentity, text: str | None
) -> Curves:
    """What earlier runs have left; ``text`` is the hash of the calibration text. Layers may lack everything."""
    cache = CurveCache.of(source, recipe, identity, text)
    return Curves(plan, recipe, cache, [_known(cache, layer) for layer in plan.layers])


def read_curves(
    source: Checkpoint, plan: ConversionPlan, recipe: Recipe, identity: CacheIdentity, text: str | None
) -> Curves | None:
    """The same, or None where a layer lacks what a choice needs."""
    curves = known_curves(source, plan, recipe, identity, text)
    wants_low_rank = "lowrank" in recipe.budget.structures
    complete = all(curve.low_rank is not None if wants_low_rank else curve.terms for curve in curves.layers)
    return curves if complete and (RESPONSE not in curves.cache.parts or spread_responses(curves)) else None


def spread_responses(curves: Curves) -> bool:
    """Give every layer the response that was measured or lies between measured ones; False where one has to be measured."""
    names = [curve.layer.target.name for curve in curves.layers]
    sample = set(measured_sample(names))
    measured = {
        name: curve.response
        for name, curve in zip(names, curves.layers, strict=True)
        if curve.response is not None and name in sample
    }
    if len(measured) < len(sample):
        return False
    for curve, response in zip(curves.layers, between(names, measured).values(), strict=True):
        curve.response = response
    return True


def measure_low_rank(cache: CurveCache, recipe: Recipe, layer: LayerPlan, subject: SubjectOf) -> None:
    """Measure and keep low rank at every rank."""
    found = subject(layer)
    weighted, predicts = recipe.weights_fits, recipe.predicts_loss
    curve = low_rank_curve(found.weight, found.bias, found.moments, weighted=weighted, predicts=predicts)
    write_part(cache.files(layer)[LOW_RANK], asdict(curve))


def measure_terms(cache: CurveCache, layer: LayerPlan, designs: Sequence[Design], subject: SubjectOf) -> None:
    """Fit designs of a layer, and keep them beside those that are known."""
    found = [*_known(cache, layer).terms, *subject(layer).measure(designs)]
    write_part(cache.files(layer)[TERMS], [asdict(candidate) for candidate in found])


def measure_terms_together(cache: CurveCache, batch: Sequence[tuple[LayerPlan, Design]], subject: SubjectOf) -> None:
    """Fit a design of each of several layers of one shape in one batch, and keep what is not known yet.

    What is known is fitted again with the others, since a batch rounds by who is in it.
    """
    found = measure_together([(subject(layer), design) for layer, design in batch])
    for (layer, design), candidate in zip(batch, found, strict=True):
        known = _known(cache, layer)
        if not known.knows(design):
            write_part(cache.files(layer)[TERMS], [asdict(one) for one in (*known.terms, candidate)])


def _known(cache: CurveCache, layer: LayerPlan) -> LayerCurve:
    files = cache.files(layer)
    low_rank = read_part(files[LOW_RANK], LOW_RANK)
    terms = read_part(files[TERMS], TERMS) or []
    response = read_part(files[RESPONSE], RESPONSE) if RESPONSE in files else None
    wanted = set(cache.structures)
    fitted = [Candidate(tuple(entry["terms"]), entry["error"], entry["loss"]) for entry in terms]
    # a rank that the layer has no room for would be no design of it
    if low_rank and not _is_design_of(layer, Candidate(({"kind": "lowrank", "rank": max(low_rank["ranks"])},), 0.0, 0.0)):
        low_rank = None
    fitted = fitted if all(_is_design_of(layer, candidate) for candidate in fitted) else []
    return LayerCurve(
        layer,
        LowRankCurve(**{key: tuple(values) for key, values in low_rank.items()})
        if low_rank and "lowrank" in wanted
        else None,
        [candidate for candidate in fitted if set(candidate.kinds) <= wanted],
        Response.of(response) if response else None,
    )


def _is_design_of(layer: LayerPlan, candidate: Candidate) -> bool:
    """Whether a layer can be built so; what a damaged file names is measured again."""
    try:
        candidate.design(layer.target.in_features, layer.target.out_features)
    except OptionError:
        return False
    return True
