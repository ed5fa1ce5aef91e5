"""Training text as token rows on disk: tokenised once, kept by content, and read through a memory map.

Documents, not rows, are split into training and held-out text, so that no document is on both sides. The order of the rows
follows from the seed and the step alone, so a resumed run sees what it would have seen.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spmconvert.errors import CalibrationError
from spmconvert.text import load_tokenizer, read_documents, row_length, token_rows


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids in one memory-mapped array.

    Attributes:
        ids: all rows after each other, [tokens] (int32).
        ends: end of every row in ``ids``, [rows] (int64).
    """

    ids: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.ends[index - 1]) if index else 0
        return torch.from_numpy(self.ids[start : int(self.ends[index])].astype(np.int64))


@dataclass(frozen=True)
class TrainingText:
    """Rows to train on, rows to measure on, and where they came from.

    Attributes:
        training: rows that are trained on.
        held_out: rows that only measure.
        padding: token id that fills short rows.
        file_sha256: hash of the text file.
    """

    training: TokenRows
    held_out: TokenRows
    padding: int
    file_sha256: str


def load_training_text(
    file: Path, directory: Path, config: Any, *, tokens: int, held_out: float, seed: int
) -> TrainingText:
    """Tokenise a text, or take it from the cache.

    Args:
        file: .txt or .jsonl.
        directory: checkpoint directory, for the tokenizer.
        config: the model's config.
        tokens: longest row.
        held_out: share of the documents that is held out.
        seed: seed of the split.

    Raises:
        CalibrationError: when the text is missing, empty, not UTF-8 or too short, or there is no tokenizer.
    """
    documents = read_documents(file)
    if len(documents) < 2:
        raise CalibrationError(f"{file} has one document; training needs one more to hold out: use a text of several lines")
    tokenizer = load_tokenizer(directory)
    length = row_length(config, tokens)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    key = hashlib.sha256(
        f"{digest} {_vocabulary_hash(tokenizer)} {config.architectures} {length} {held_out} {seed}".encode()
    ).hexdigest()[:32]
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = min(len(documents) - 1, max(1, round(held_out * len(documents))))
    parts = []
    for part, chosen in (("held_out", sorted(order[:cut])), ("training", sorted(order[cut:]))):
        place = cache_directory() / key / part
        if not (place / "ends.npy").exists():
            _store(token_rows([documents[i] for i in chosen], tokenizer, config, length, file), place)
        parts.append(TokenRows(np.load(place / "ids.npy", mmap_mode="r"), np.load(place / "ends.npy", mmap_mode="r")))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return TrainingText(parts[1], parts[0], padding, digest)


def cache_directory() -> Path:
    """Where token rows are kept: ``SPMCONVERT_CACHE``, or ``spmconvert`` in the user's cache directory."""
    chosen = os.environ.get("SPMCONVERT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spmconvert" / "tokens"


def batch_indices(rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of one step: epochs of all rows, each in an order of its own, cut into batches without a gap between epochs."""
    chosen: list[int] = []
    position = step * batch_size
    while len(chosen) < batch_size:
        epoch, offset = divmod(position + len(chosen), rows)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen += order[offset : offset + batch_size - len(chosen)].tolist()
    return chosen


def _vocabulary_hash(tokenizer: Any) -> str:
    text = repr(sorted(tokenizer.get_vocab().items())) + repr(tokenizer.all_special_tokens)
    return hashlib.sha256(text.encode()).hexdigest()


def _store(rows: list[Tensor], place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    arrays = {
        "ids": torch.cat(rows).to(torch.int32).numpy(),
        "ends": torch.tensor([len(row) for row in rows]).cumsum(0).numpy(),
    }
    for name, array in arrays.items():
        temporary = place / f"{name}.{os.getpid()}.npy"
        np.save(temporary, array)
        temporary.replace(place / f"{name}.npy")
