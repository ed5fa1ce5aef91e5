"""Training data as rows on disk: tokenised once, kept by content, and read through a memory map.

Documents, not rows, are split into training and held-out text, so that no document is on both sides. The order of the rows
and the masks of masked models follow from the seed and the step alone, so a resumed run sees what it would have seen.
Models that read no text (images, sound) read their processor's tensors from a .safetensors file, one row an item.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from spmconvert.data.documents import content_hash, read_documents
from spmconvert.data.media import TENSOR_SUFFIX, folder_inputs, read_tensors
from spmconvert.data.standin import stand_in
from spmconvert.data.tokens import (
    check_reads_text,
    load_tokenizer,
    padded_batch,
    row_length,
    token_rows,
    tokenizer_hash,
)
from spmconvert.errors import CalibrationError, NotWritableError
from spmconvert.recipe.recipe import AUTO_TEXT, Training
from spmconvert.system.caches import cache_directory, check_cache, keep

# share of the tokens that masked models are asked about, as in their own training
MASKED_SHARE = 0.15
# steps whose rows are sorted by length together: with the random sentences of a wiki text, 45 % of a batch would be padding
BUCKET_STEPS = 16


class Rows(Protocol):
    """Rows that a model can be run on."""

    def __len__(self) -> int:
        """Number of rows."""

    def size(self, index: int) -> int:
        """Tokens of a row, or 1 where all rows are alike."""

    def batch(self, indices: Sequence[int], model: Any, step: int) -> dict[str, Any]:
        """Rows as keyword arguments of a model, on its device."""


@dataclass(frozen=True)
class Masking:
    """How tokens are masked for a masked language model.

    Attributes:
        token: id of the mask.
        spared: ids that are never masked.
        seed: seed of the masks.
    """

    token: int
    spared: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids in one memory-mapped array.

    Attributes:
        ids: all rows after each other, [tokens] (int32).
        ends: end of every row in ``ids``, [rows] (int64).
        padding: token id that fills short rows.
        masking: how tokens are masked, or None.
    """

    ids: np.ndarray
    ends: np.ndarray
    padding: int
    masking: Masking | None = None

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.ends[index - 1]) if index else 0
        return torch.from_numpy(self.ids[start : int(self.ends[index])].astype(np.int64))

    def size(self, index: int) -> int:
        """Tokens of a row."""
        return int(self.ends[index] - (self.ends[index - 1] if index else 0))

    def batch(self, indices: Sequence[int], model: Any, step: int) -> dict[str, Any]:
        """Padded rows; for a masked model masked anew at every step, with the masked tokens as labels, -100 elsewhere."""
        rows = [self[index] for index in indices]
        if self.masking is None:
            return padded_batch(rows, self.padding, model)
        masked = [self._masked(row, index, step, self.masking) for row, index in zip(rows, indices, strict=True)]
        labels = [row.where(row != hidden, -100) for row, hidden in zip(rows, masked, strict=True)]
        padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return {**padded_batch(masked, self.padding, model), "labels": padded.to(model.device)}

    def _masked(self, row: Tensor, index: int, step: int, masking: Masking) -> Tensor:
        generator = torch.Generator().manual_seed(masking.seed * 1_000_003 + step * len(self) + index)
        chosen = torch.rand(len(row), generator=generator) < MASKED_SHARE
        spared = torch.isin(row, torch.tensor(masking.spared, dtype=row.dtype))
        return row.where(~chosen | spared, masking.token)


@dataclass(frozen=True)
class TensorRows:
    """Rows of a processor's tensors.

    Attributes:
        tensors: keyword arguments of the model by name, each [items, ...].
        chosen: items that are these rows.
    """

    tensors: dict[str, Tensor]
    chosen: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    def size(self, index: int) -> int:
        """All rows are alike."""
        return 1

    def batch(self, indices: Sequence[int], model: Any, step: int) -> dict[str, Any]:
        """The items' tensors."""
        items = torch.tensor([self.chosen[index] for index in indices])
        return {name: tensor[items].to(model.device) for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on, rows to measure on, and where they came from.

    Attributes:
        training: rows that are trained on.
        held_out: rows that only measure.
        sha256: hash of the file, or of the documents of a dataset.
    """

    training: Rows
    held_out: Rows
    sha256: str


def load_training_data(
    source: str, directory: Path, config: Any, training: Training, layers: Iterable[str] = ()
) -> TrainingData:
    """Tokenise a text or take it from the cache; or open a file of tensors.

    Args:
        source: .txt, .jsonl, .parquet or .safetensors file, ``datasets:ID``, a folder of pictures or sounds, or ``auto``.
        directory: checkpoint directory, for the tokenizer.
        config: the model's config.
        training: row length, held-out share, column and seed.
        layers: names of those that are converted.

    Raises:
        CalibrationError: when the data is missing, empty, not UTF-8 or too short, or there is no tokenizer.
        OptionError: when reading it needs a package that is not installed.
    """
    if source == AUTO_TEXT:
        found = stand_in("training", directory, config, layers)
        if found is None:
            raise CalibrationError(
                f"{directory} has neither a tokenizer for text alone nor a processor of pictures or sounds, so nothing "
                "stands in for data; give its processor's tensors with --data FILE.safetensors"
            )
        source = str(found.file)
    elif Path(source).is_dir():
        source = str(folder_inputs(Path(source), directory, config))
    if source.endswith(TENSOR_SUFFIX):
        return _load_tensors(Path(source), config, training)
    check_reads_text(directory, config, source)
    documents = read_documents(source, training.column)
    if len(documents) < 2:
        raise CalibrationError(
            f"{source} has one document; training needs one more to hold out: use a text of several lines"
        )
    tokenizer = load_tokenizer(directory)
    masking = _masking(config, tokenizer, training.seed)
    digest = content_hash(source, documents)
    length = row_length(config, training.block_size)
    splits = _split(len(documents), training)
    numbers = f"{config.architectures} {length} {training.column} {training.held_out} {training.seed}"
    key = f"{digest} {tokenizer_hash(directory)} {numbers}"
    token_directory = cache_directory("tokens") / hashlib.sha256(key.encode()).hexdigest()[:32]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    check_cache("tokens")
    parts = []
    for part, chosen in splits.items():
        kept = _kept(token_directory / part)
        if kept is None:
            what = f"the {part.replace('_', '-')} part of {source}, {len(chosen)} of {len(documents)} documents,"
            rows = token_rows([documents[i] for i in chosen], tokenizer, config, length, what)
            _store(rows, token_directory / part)
            kept = _kept(token_directory / part)
        if kept is None:
            raise NotWritableError(
                f"{token_directory} does not keep what is written to it; set SPMCONVERT_CACHE to a folder"
            )
        parts.append(TokenRows(*kept, padding, masking))
    return TrainingData(parts[0], parts[1], digest)


def batch_indices(rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of one step: epochs of all rows, each in an order of its own, cut into batches without a gap between epochs."""
    chosen: list[int] = []
    position = step * batch_size
    while len(chosen) < batch_size:
        epoch, offset = divmod(position + len(chosen), rows)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen += order[offset : offset + batch_size - len(chosen)].tolist()
    return chosen


def step_indices(rows: Rows, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of one step, of about the same length: those of a few steps are sorted by length, and cut in a random order."""
    together = max(1, min(BUCKET_STEPS, len(rows) // batch_size))
    bucket, step_in_bucket = divmod(step, together)
    chosen = sorted(batch_indices(len(rows), batch_size * together, bucket, seed), key=rows.size)
    order = torch.randperm(together, generator=torch.Generator().manual_seed(seed * 1_000_003 + bucket))
    first = int(order[step_in_bucket]) * batch_size
    return chosen[first : first + batch_size]


def _split(count: int, training: Training) -> dict[str, list[int]]:
    """Items by part, drawn with the seed; both parts have one at least."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(training.seed)).tolist()
    cut = min(count - 1, max(1, round(training.held_out * count)))
    return {"training": sorted(order[cut:]), "held_out": sorted(order[:cut])}


def _load_tensors(file: Path, config: Any, training: Training) -> TrainingData:
    tensors = read_tensors(file, config)
    count = len(next(iter(tensors.values())))
    if count < 2:
        raise CalibrationError(f"{file} has {count} items; 2 are needed, one to train on and one held out")
    parts = [TensorRows(tensors, tuple(chosen)) for chosen in _split(count, training).values()]
    return TrainingData(parts[0], parts[1], content_hash(file))


def _masking(config: Any, tokenizer: Any, seed: int) -> Masking | None:
    """Masks for architectures that were trained on them.

    Raises:
        CalibrationError: when the tokenizer has no mask.
    """
    if not (config.architectures or [""])[0].endswith("ForMaskedLM"):
        return None
    if tokenizer.mask_token_id is None:
        raise CalibrationError(f"the tokenizer has no mask token, which {config.architectures[0]} needs; repair its files")
    return Masking(tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), seed)


def _kept(directory: Path) -> tuple[Any, Any] | None:
    """Ids of all rows one after the other and where each ends, from the disk; None where they are not whole there."""
    try:
        ids, ends = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("ids", "ends"))
    except (OSError, ValueError, EOFError):
        return None
    whole = ids.ndim == ends.ndim == 1 and len(ends) and ids.dtype == np.int32 and ends.dtype == np.int64
    return (ids, ends) if whole and ends[-1] == len(ids) and (np.diff(ends) > 0).all() and ends[0] > 0 else None


def _store(rows: list[Tensor], directory: Path) -> None:
    arrays = {
        "ids": torch.cat(rows).to(torch.int32).numpy(),
        "ends": torch.tensor([len(row) for row in rows]).cumsum(0).numpy(),
    }
    for name, array in arrays.items():
        keep(directory / f"{name}.npy", partial(np.save, arr=array))
