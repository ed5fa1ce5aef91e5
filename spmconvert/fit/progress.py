"""Who is told how a conversion gets on: the protocol, and the listener that says nothing."""

from typing import Protocol

from spmconvert.fit.layer import LayerRecord
from spmconvert.plan.plan import ConversionPlan


class Progress(Protocol):
    """Who wants to know how a conversion gets on."""

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
