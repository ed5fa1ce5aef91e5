"""Hidden states of many batches: in memory, or in a file where they would be too much for it.

The file is mapped, so that what is not at work may leave memory, and has no name any more once it is mapped: it is gone
with the process, however that ends.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

# bytes that stay in memory
STATES_LIMIT = 1 << 28


class States:
    """One tensor a batch, float32, on the CPU while it is not at work.

    Args:
        states: [.., features], one a batch; later ones have the same shapes.
        folder: where a file may be; None keeps everything in memory.
        limit: bytes that stay in memory.
    """

    def __init__(self, states: Sequence[Tensor], folder: Path | None = None, limit: int | None = None) -> None:
        sizes = [state.numel() for state in states]
        self._device = states[0].device if states else torch.device("cpu")
        self.is_mapped = folder is not None and 4 * sum(sizes) > (STATES_LIMIT if limit is None else limit)
        if self.is_mapped:
            assert folder is not None
            parts = _mapped(sum(sizes), folder).split(sizes)
            self._states = [part.view(state.shape) for part, state in zip(parts, states, strict=True)]
        else:
            self._states = list(states)
        for batch, state in enumerate(states):
            self[batch] = state

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))

    def __getitem__(self, batch: int) -> Tensor:
        return self._states[batch].to(self._device)

    def __setitem__(self, batch: int, state: Tensor) -> None:
        kept = state.detach()
        if self.is_mapped:
            self._states[batch].copy_(kept)
        else:
            # it may lie in the file of others, where something else takes its place
            self._states[batch] = kept.to("cpu", torch.float32, copy=True)


def _mapped(count: int, folder: Path) -> Tensor:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        return torch.from_file(file.name, shared=True, size=count, dtype=torch.float32)
