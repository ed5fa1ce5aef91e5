"""Sums over batches that several processes compute together, with the bytes that one process alone gives.

Batches are dealt out to a fixed number of shares. Each share is summed by itself, and shares are added in their order,
whoever summed them. Its price for one process alone is a second sum in memory; several keep shares in files until all of
them are there.
"""

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from spmconvert.system.files import save_whole
from spmconvert.system.team import Team

# as many processes can take part
SHARES = 8

Tensors = dict[str, Tensor]


def dealt(count: int, team: Team) -> list[tuple[int, list[int]]]:
    """Shares of so many batches that are this process's: their numbers, and those of their batches."""
    return [(share, list(range(share, count, SHARES))) for share in team.share(range(min(SHARES, count)))]


class SharedSums:
    """Sums by name.

    Args:
        team: who computes them.
        folder: that all of them see.
        kind: of sums, so that those of a process that is ahead are no others'.
        merge: adds the second value to the first.
    """

    def __init__(self, team: Team, folder: Path, kind: str, merge: Callable[[Tensors, Tensors], Tensors]) -> None:
        self._team, self._folder, self._kind, self._merge = team, folder, kind, merge
        self._totals: dict[str, Tensors] = {}

    def add(self, name: str, share: int, value: Tensors) -> None:
        """Take the sum over a share; shares come in their order, and one without a value is left out."""
        if self._team.count == 1:
            self._totals[name] = self._merge(self._totals[name], value) if name in self._totals else value
        else:
            save_whole(self._file(name, share), lambda temporary: save_file(value, temporary))

    def take(self, names: Sequence[str]) -> Iterator[tuple[str, Tensors | None]]:
        """The totals of those names that are this process's to keep, None where no share had a value.

        Everybody asks for the same names, once.
        """
        self._team.wait()
        for name in self._team.share(names):
            yield name, self._totals.pop(name, None) if self._team.count == 1 else self._added(name)

    def _added(self, name: str) -> Tensors | None:
        total: Tensors | None = None
        for file in filter(Path.exists, (self._file(name, share) for share in range(SHARES))):
            value = load_file(file)
            file.unlink()
            total = value if total is None else self._merge(total, value)
        return total

    def _file(self, name: str, share: int) -> Path:
        return self._folder / f"{sha256(name.encode()).hexdigest()[:32]}.{self._kind}-{share}.safetensors"
