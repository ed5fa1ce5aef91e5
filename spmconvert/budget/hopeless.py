"""Say by the curves, before anything is fitted, that a budget loses more than a finetune wins back, and what would not.

The losses are those that the choice made least, a sum over layers. It is not what the converted model will lose: errors of
several layers add up to more than their sum, and refinement takes away a third to a half. So the limits are predictions,
too, judged from what conversions lost and what a quarter of an hour of finetune won back (docs/results.md). What it gives
up: classifiers, regressions and plain relative errors, for which no such limit was measured.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from spmconvert.budget.allocation import Limit, allocate
from spmconvert.budget.curves import Curves
from spmconvert.errors import OptionError
from spmconvert.outputs.objective import Objective
from spmconvert.recipe.recipe import Budget

# predicted losses up to which a finetune makes a model worth having, with their units
MOST_LOST: Mapping[Objective, tuple[float, str]] = {
    "logits": (3.0, "nats a token"),
    "hidden": (0.25, "of the squared length of an embedding"),
}
# steps from what was asked for to the layers as they are
STEPS = 10


@dataclass(frozen=True)
class Hopeless:
    """A budget that loses too much.

    Attributes:
        loss: that is predicted for it.
        most: that a finetune makes up for.
        unit: of both, in words.
        instead: the nearest budget of the same kind that loses no more than that, with what it is predicted to lose; None
            where every one that was tried does.
    """

    loss: float
    most: float
    unit: str
    instead: tuple[Budget, float] | None

    def describe(self, asked: Budget) -> str:
        """One line about the budget that was asked for."""
        lost = f"{asked.option} is predicted to lose {self.loss:.2g} {self.unit}, more than a finetune wins back"
        if self.instead is None:
            return f"{lost} (up to {self.most:g}), and so is every milder one; target other layers"
        budget, loss = self.instead
        return f"{lost} (up to {self.most:g}); {budget.option} would lose {loss:.2g}"


def hopeless(
    curves: Curves, limit: Limit, loss: float, objective: Objective, timed: Callable[[Limit], Limit | None]
) -> Hopeless | None:
    """Whether a budget loses more than a finetune wins back; None where it does not, or where nothing says what it does.

    Args:
        curves: what is known of the layers.
        limit: what was allowed.
        loss: that is predicted for the chosen designs.
        objective: what the model's outputs are compared by.
        timed: gives a limit of a speed-up the seconds that its layers may take; None where the model was not timed.
    """
    if limit.budget.sensitivity == "none" or limit.budget.max_error is not None or objective not in MOST_LOST:
        return None
    most, unit = MOST_LOST[objective]
    if loss <= most:
        return None
    for milder in _milder(limit):
        try:
            allowed = milder if milder.budget.speedup is None else timed(milder)
            less = None if allowed is None else allocate(curves, allowed).choice.loss
        except OptionError:
            # it would leave every layer as it is
            break
        if less is not None and less <= most:
            return Hopeless(loss, most, unit, (milder.budget, less))
    return Hopeless(loss, most, unit, None)


def _milder(limit: Limit) -> Iterator[Limit]:
    """Limits of the same kind, from the next one to the one before the layers as they are."""
    asked = limit.budget.limits
    # of the others all is 1
    free = {name: sum(layer.dense_bytes for layer in limit.layers) if name == "keep_bytes" else 1.0 for name in asked}
    for step in range(1, STEPS):
        values = {name: value + (free[name] - value) * step / STEPS for name, value in asked.items()}
        milder = {name: int(value) if name == "keep_bytes" else round(value, 2) for name, value in values.items()}
        if milder != asked and not any(value == free[name] for name, value in milder.items()):
            yield replace(limit, budget=limit.budget.model_copy(update=milder))
