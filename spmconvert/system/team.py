"""Several processes that make one run together: the first leads, the others do with it whatever it names.

What they find goes through files that all of them see, so the leader alone decides, and times that differ from process to
process decide nothing twice. Communication is accelerate's. A process that fails ends with its error, and whoever launched
the others ends them: nobody waits for it here.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

Item = TypeVar("Item")
# a process may wait for fits of a large model
_TIMEOUT = timedelta(days=7)


class Team:
    """One process, or several.

    Args:
        state: accelerate's ``PartialState``; None for one process alone.

    Attributes:
        rank: number of this process.
        count: number of processes.
    """

    def __init__(self, state: Any = None) -> None:
        self._state = state
        self.rank: int = 0 if state is None else state.process_index
        self.count: int = 1 if state is None else state.num_processes

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What of a list is this process's to do."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Until all are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def total(self, number: int) -> int:
        """Sum of everybody's number."""
        if self._state is None:
            return number
        from accelerate.utils import gather_object

        return sum(gather_object([number]))

    @contextmanager
    def led(self, work: Mapping[str, Callable[[Any], None]]) -> Iterator[Callable[[str, Any], None]]:
        """Lead the others: gives a function that has everybody do a kind of work on an argument, and waits for all."""

        def together(kind: str, argument: Any) -> None:
            self.same((kind, argument))
            work[kind](argument)
            self.wait()

        yield together
        # where the leader fails, the others are ended by whoever launched them
        self.same(None)

    def follow(self, work: Mapping[str, Callable[[Any], None]]) -> None:
        """Do what the leader names, until it has no more."""
        while (told := self.same(None)) is not None:
            kind, argument = told
            work[kind](argument)
            self.wait()

    def same(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self._state is None:
            return value
        from accelerate.utils import broadcast_object_list

        box = [value]
        broadcast_object_list(box)
        return box[0]


ALONE = Team()


def is_first() -> bool:
    """Whether this process is the first that a launcher started, or the only one: who says what is found."""
    return int(os.environ.get("RANK", "0")) == 0


def is_alone() -> bool:
    """Whether no launcher started other processes with this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2


def join_team(device: str) -> tuple[Team, str]:
    """The processes that a launcher started with this one, and this one's device.

    Args:
        device: that was asked for; where it is ``cuda``, each process takes the one of its rank.
    """
    if is_alone():
        return Team(), device
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=_TIMEOUT)
    return Team(state), str(state.device) if device == "cuda" else device
