"""The next character of Shakespeare, by one transformer block whose six matrices have the structure.

Query, key, value and output projections and both matrices of the MLP (four times as wide) are replaced; the embedding of
characters and positions and the head stay dense, as does the arithmetic of attention. The first nine tenths of the text are
trained on, half of the rest chooses rate and state, the other half is measured.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.paper.structures import MakeLinear
from benchmarks.paper.training import Batch, Task

HEADS = 4


@dataclass(frozen=True)
class Shakespeare:
    """Settings of the experiment.

    Attributes:
        data: files of plain text, joined.
        block_size: characters a row.
        batch_size: rows a step.
        held_out: rows to validate on, and as many to test on.
    """

    data: list[Path]
    block_size: int
    batch_size: int
    held_out: int
    measure: str = "bits a character"

    def tasks(self, width: int, seed: int) -> Iterator[Task]:
        """The one task; the seed is that of networks and batches."""
        text = "".join(file.read_text(encoding="utf-8") for file in self.data)
        characters = {character: index for index, character in enumerate(sorted(set(text)))}
        stream = torch.tensor([characters[character] for character in text])
        first, second = int(0.9 * len(stream)), int(0.95 * len(stream))
        validation, test = (self.spread(part) for part in (stream[first:second], stream[second:]))
        build = partial(Transformer, len(characters), self.block_size)
        batch = partial(windows, stream[:first], self.block_size, self.batch_size)
        yield Task(f"{len(text):,} characters", build, batch, validation, test, granularity=HEADS)

    def spread(self, stream: Tensor) -> Batch:
        """Rows at equal distances, as many as there should be or fit without overlap."""
        fitting = (len(stream) - 1) // self.block_size
        chosen = torch.linspace(0, fitting - 1, min(fitting, self.held_out)).long() * self.block_size
        return cut(stream, chosen, self.block_size)


def windows(stream: Tensor, block_size: int, rows: int, generator: torch.Generator) -> Batch:
    """A batch of windows at random places."""
    return cut(stream, torch.randint(len(stream) - block_size, (rows,), generator=generator), block_size)


def cut(stream: Tensor, starts: Tensor, block_size: int) -> Batch:
    """Windows [rows, block_size] that begin at the given places, and the characters that follow each of theirs."""
    places = starts[:, None] + torch.arange(block_size)
    return stream[places], stream[places + 1]


class Transformer(nn.Module):
    """One pre-norm block between embeddings and head."""

    def __init__(self, characters: int, block_size: int, hidden: int, linear: MakeLinear) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, hidden)
        self.positions = nn.Embedding(block_size, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
        self.projections = nn.ModuleList(linear(hidden, hidden) for _ in range(4))
        self.mlp = nn.Sequential(linear(hidden, 4 * hidden), nn.GELU(), linear(4 * hidden, hidden))
        self.head = nn.Linear(hidden, characters)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=math.sqrt(0.5))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [rows, length, characters] of ids [rows, length]."""
        x = self.characters(ids) + self.positions.weight[: ids.shape[1]]
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x))

    def attention(self, x: Tensor) -> Tensor:
        """Causal attention of x [rows, length, hidden]."""
        query, key, value = (project(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for project in self.projections[:3])
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projections[3](mixed.transpose(1, 2).flatten(-2))
