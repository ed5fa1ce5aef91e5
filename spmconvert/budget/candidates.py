"""Ways to build a layer, and what each loses on the rows that choose designs.

A candidate is fitted with few iterations, which is a slight handicap against low rank and shows the same order of
structures as a full fit. The loss is the predicted one where an ``OutputMetric`` says what errors cost, else the relative
error.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.calibrate.store import Moments
from spmconvert.fit.aim import Aim
from spmconvert.fit.batched_solver import fit_batch_
from spmconvert.fit.error import measure_error
from spmconvert.fit.solver import fit_aim_
from spmconvert.operator.design import Design
from spmconvert.operator.factors import covariance_root
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.registry import term_class
from spmconvert.operator.terms.term import Term
from spmconvert.recipe.recipe import Recipe

# share of a layer's parameters that a term takes beside low rank; two thirds are worse, see docs/results.md
BESIDE_SHARE = 1 / 3


@dataclass(frozen=True)
class Candidate:
    """One way to build a layer.

    Attributes:
        terms: what it is the sum of, as in config.json.
        error: E‖y - ŷ‖² / E‖y‖² on the rows that choose.
        loss: predicted loss of the model, or the error where nothing predicts one.
    """

    terms: tuple[dict[str, Any], ...]
    error: float
    loss: float

    def design(self, in_features: int, out_features: int) -> Design:
        """The candidate at a layer's size."""
        return Design.from_json(in_features, out_features, self.terms)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of its terms."""
        return tuple(term["kind"] for term in self.terms)


@dataclass(frozen=True)
class Subject:
    """A dense layer at work, with what is known about it.

    Attributes:
        weight: [out_features, in_features], float32.
        bias: [out_features], or None.
        moments: of its inputs, on the weight's device.
        recipe: how candidates are fitted.
    """

    weight: Tensor
    bias: Tensor | None
    moments: Moments
    recipe: Recipe

    def aim(self, design: Design, root: Tensor | None = None) -> Aim:
        """What a fresh layer of a design is fitted to."""
        layer = SPMLinear(
            design.in_features, design.out_features, terms=design.terms, device=self.weight.device, dtype=torch.float32
        )
        metric = self.moments.metric if self.recipe.weights_fits else None
        return Aim(layer, self.weight, self.bias, self.moments.fitted, metric=metric, root=root)

    def fitted(self, design: Design, root: Tensor | None = None) -> SPMLinear:
        """A design, fitted with few iterations."""
        aim = self.aim(design, root)
        fit_aim_(aim, iterations=self.recipe.budget.iterations)
        return aim.layer

    def measure(self, designs: Iterable[Design]) -> list[Candidate]:
        """Fit and measure designs."""
        root = covariance_root(self.moments.fitted.covariance)
        return [self.measured(design, self.fitted(design, root)) for design in designs]

    @torch.no_grad()
    def measured(self, design: Design, layer: SPMLinear) -> Candidate:
        """What a fitted layer of a design loses."""
        choosing, metric = self.moments.choosing, self.moments.metric
        assert choosing is not None
        dense, other = (self.weight, self.bias), (layer.to_dense(), layer.held_bias)
        error = measure_error(dense, other, choosing).relative
        loss = predicted_loss(metric, dense, other, choosing) if metric is not None and self.recipe.predicts_loss else error
        return Candidate(tuple(design.to_json()), error, loss)


def measure_together(subjects: Sequence[tuple[Subject, Design]]) -> list[Candidate]:
    """Fit and measure a design of every layer, all of one shape, in one batch."""
    aims = [subject.aim(design) for subject, design in subjects]
    fit_batch_(aims, iterations=subjects[0][0].recipe.budget.iterations)
    return [subject.measured(design, aim.layer) for (subject, design), aim in zip(subjects, aims, strict=True)]


def predicted_loss(
    metric: OutputMetric,
    dense: tuple[Tensor, Tensor | None],
    replacement: tuple[Tensor, Tensor | None],
    statistics: ActivationStatistics,
) -> float:
    """Second-order loss of a model with a replacement's (weight, bias) in the place of a dense layer's."""
    difference = dense[0].float() - replacement[0].float()
    shift = difference @ statistics.mean
    for (_, bias), sign in ((dense, 1), (replacement, -1)):
        shift = shift if bias is None else shift + sign * bias.float()
    rows = covariance_root(statistics.covariance) @ difference.t()
    return (metric.energy(rows) + metric.energy(shift[None])).item()


def designs_of(kind: str, in_features: int, out_features: int, parameters: int, *, beside_low_rank: bool) -> list[Design]:
    """Designs with a term of a kind and at most so many parameters, alone and beside low rank.

    A term whose size is its own leaves low rank what is left; another one takes its share.
    """
    found = term_class(kind)
    sizes = (in_features, out_features)
    standing = found.standing_designs(*sizes)
    sums: list[tuple[Term, ...]] = []
    if not standing:
        sums += [(term,) for term in found.designs(*sizes, parameters)]
    if beside_low_rank:
        for term in standing or found.designs(*sizes, int(BESIDE_SHARE * parameters)):
            sums += _with_low_rank(term, parameters - term.parameter_count())
    return _distinct(*sizes, sums)


def standing_designs_of(kind: str, in_features: int, out_features: int) -> list[Design]:
    """Designs with a term of a kind whose size is its own, alone."""
    terms = term_class(kind).standing_designs(in_features, out_features)
    return _distinct(in_features, out_features, [(term,) for term in terms])


def _with_low_rank(term: Term, parameters: int) -> list[tuple[Term, ...]]:
    # not rounded to what is fast: beside another term that would leave a good part of the parameters out
    rank = min(parameters // (term.in_features + term.out_features), term.in_features, term.out_features)
    return [(term, LowRank(term.in_features, term.out_features, rank))] if rank > 0 else []


def _distinct(in_features: int, out_features: int, sums: list[tuple[Term, ...]]) -> list[Design]:
    designs = dict.fromkeys(Design(in_features, out_features, terms) for terms in sums)
    return [design for design in designs if design.parameter_count(bias=False) < in_features * out_features]
