"""Who is told how a conversion gets on: the protocol, and the listener that says nothing."""

from typing import Protocol

from spmconvert.data.standin import StandIn
from spmconvert.fit.layer import LayerRecord
from spmconvert.plan.plan import ConversionPlan
from spmconvert.recipe.recipe import Budget, Recipe


class Progress(Protocol):
    """Who wants to know how a conversion gets on."""

    def reading(self, recipe: Recipe, standing_in: StandIn | None) -> None:
        """It is settled what the layers are calibrated on, and what of it stands in for what nobody gave."""

    def reading_few(self, tokens: int, width: int) -> None:
        """The rows that are fitted have fewer tokens than a layer has inputs."""

    def taking(self, budget: Budget) -> None:
        """A budget is taken, since neither designs nor one were named."""

    def losing(self, warning: str) -> None:
        """A budget is predicted to lose more than a finetune wins back."""

    def measured(self, name: str, done: int, total: int) -> None:
        """A layer's curve is there."""

    def planned(self, plan: ConversionPlan) -> None:
        """The layers are known."""

    def calibrating(self, done: int, total: int) -> None:
        """So many calibration batches are through."""

    def fitted(self, record: LayerRecord, done: int, total: int) -> None:
        """A layer is finished."""

    def refined(self, name: str, done: int, total: int) -> None:
        """A block is refined."""

    def writing(self, total_bytes: int) -> None:
        """The output is being written."""


class Silent:
    """Nobody listens."""

    def reading(self, recipe: Recipe, standing_in: StandIn | None) -> None:
        """Nobody listens."""

    def reading_few(self, tokens: int, width: int) -> None:
        """Nobody listens."""

    def taking(self, budget: Budget) -> None:
        """Nobody listens."""

    def losing(self, warning: str) -> None:
        """Nobody listens."""

    def measured(self, name: str, done: int, total: int) -> None:
        """Nobody listens."""

    def planned(self, plan: ConversionPlan) -> None:
        """Nobody listens."""

    def calibrating(self, done: int, total: int) -> None:
        """Nobody listens."""

    def fitted(self, record: LayerRecord, done: int, total: int) -> None:
        """Nobody listens."""

    def refined(self, name: str, done: int, total: int) -> None:
        """Nobody listens."""

    def writing(self, total_bytes: int) -> None:
        """Nobody listens."""
