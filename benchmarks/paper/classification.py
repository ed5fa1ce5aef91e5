"""Which of the longest articles a sentence is from, by a perceptron over hashed words.

It stands in for AG News, which is not in the repository and which nothing here downloads. Articles of WikiText take the
place of topics, their sentences that of news items: some thousands of rows instead of 120,000, and more classes. A file
ending in ``.jsonl``, with "text" and "label" on every line, is read as it is, so that the paper's own dataset can be
run: ``--data ag-news-train.jsonl --test ag-news-test.jsonl``. Without ``--test`` one row in eight is measured. Another
one in eight chooses the rate and the state.

The width is the number of hash buckets: a sentence is its counts of lower-case words by bucket, scaled to mean square
1.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.compositional import perceptron
from benchmarks.paper.training import Task, random_rows

Labelled = list[tuple[str, str]]
SHORTEST_SENTENCE = 40
HEADING = re.compile(r"^ = [^=].* = $")


@dataclass(frozen=True)
class Classification:
    """Settings of the experiment.

    Attributes:
        data: files of labelled texts.
        classes: the most frequent labels to keep.
        batch_size: rows a step.
        test: another file of them, only measured; None splits the data.
    """

    data: list[Path]
    classes: int
    batch_size: int
    test: Path | None = None
    measure: str = "accuracy"

    def tasks(self, width: int, seed: int) -> Iterator[Task]:
        """The one task; the split is always the same, the seed is that of networks and batches."""
        rows = [row for file in self.data for row in read(file)]
        counts = Counter(name for _, name in rows)
        names = [name for name, _ in counts.most_common(self.classes)]
        rows = [row for row in rows if row[1] in names]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [rows[index] for index in order]
        held_out = len(rows) // 8
        validation, rows = rows[:held_out], rows[held_out:]
        if self.test is None:
            tested, trained = rows[:held_out], rows[held_out:]
        else:
            tested, trained = [row for row in read(self.test) if row[1] in names], rows
        parts = [encode(part, names, width) for part in (trained, validation, tested)]
        batch = partial(random_rows, parts[0], self.batch_size)
        name = f"{len(trained)} texts, {len(names)} labels"
        yield Task(name, partial(perceptron, width, len(names)), batch, parts[1], parts[2])


def read(file: Path) -> Labelled:
    """Texts with their labels."""
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        return [(str(row["text"]), str(row["label"])) for row in rows]
    return list(sentences(content))


def sentences(content: str) -> Iterator[tuple[str, str]]:
    """Sentences of a WikiText file, with the heading of their article."""
    article = ""
    for line in content.splitlines():
        if HEADING.match(line):
            article = line.strip(" =")
        elif line.strip() and not line.startswith(" ="):
            yield from ((part, article) for part in line.split(" . ") if len(part) >= SHORTEST_SENTENCE)


def encode(rows: Labelled, names: list[str], width: int) -> tuple[Tensor, Tensor]:
    """Hashed words [rows, width] and classes [rows]."""
    counts = torch.zeros(len(rows), width)
    for index, (text, _) in enumerate(rows):
        for word in re.findall(r"\w+", text.lower()):
            counts[index, zlib.crc32(word.encode()) % width] += 1
    inputs = torch.nn.functional.normalize(counts) * width**0.5
    return inputs, torch.tensor([names.index(name) for _, name in rows])
