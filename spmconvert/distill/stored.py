"""The teacher's likeliest words, stored: distillation without the teacher in memory.

One pass of the teacher writes, for every token of every row, the k likeliest words and their log-probabilities; a later run
reads them through a memory map. Rows are found by their content, so neither the order nor the split has to be the same,
and a row that was never stored is an error. It costs 6k bytes a token (k = 64: 384 MB a million tokens) and everything the
other words had to say, which count as one word.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spmconvert.data.training import Rows, TokenRows, TrainingData
from spmconvert.errors import CheckpointError, OptionError, OutputError, first_line
from spmconvert.outputs.probe import vocabulary_size
from spmconvert.system.parsing import parse_json

ABOUT_FILE = "about.json"
FORMAT_VERSION = 1
BATCH_ROWS = 8


class StoredLogits:
    """Stored words of a teacher, by the content of a row.

    Args:
        directory: what ``store_logits`` wrote.
        teacher_sha256: content hash that the teacher must have.

    Attributes:
        sha256: hash of what is stored about them.

    Raises:
        CheckpointError: when the directory holds no stored logits, or those of another teacher.
    """

    def __init__(self, directory: Path, teacher_sha256: str) -> None:
        try:
            content = (directory / ABOUT_FILE).read_text(encoding="utf-8")
            about = parse_json(content)
            self._words, self._values, ends, keys = (
                np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("words", "log_probabilities", "ends", "keys")
            )
        except (OSError, ValueError, EOFError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
            raise CheckpointError(
                f"{directory} holds no stored logits ({reason}); write them with --store-logits"
            ) from None
        if not isinstance(about, dict) or not _fit(self._words, self._values, ends, keys):
            raise CheckpointError(f"{directory} holds stored logits that are damaged; write them again with --store-logits")
        if about.get("format_version") != FORMAT_VERSION or about.get("teacher_sha256") != teacher_sha256:
            raise CheckpointError(
                f"{directory} holds logits of another teacher or in another format; write them again with --store-logits"
            )
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        starts = [0, *ends[:-1].tolist()]
        self._spans = {bytes(key): (start, end) for key, start, end in zip(keys, starts, ends.tolist(), strict=True)}

    def lookup(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Words [tokens, k] (int64) and log-probabilities [tokens, k] (float32) of all tokens of a batch, row after row.

        Raises:
            CheckpointError: when a row was never stored.
        """
        ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu()
        spans = [self._spans.get(_key(row[real])) for row, real in zip(ids, mask, strict=True)]
        if None in spans:
            raise CheckpointError(
                "the stored logits lack a row of this text; use the text, block_size and tokenizer they were made with"
            )
        slices = [slice(*span) for span in spans if span is not None]
        words = np.concatenate([self._words[part] for part in slices]).astype(np.int64)
        values = np.concatenate([self._values[part] for part in slices]).astype(np.float32)
        device = batch["input_ids"].device
        return torch.from_numpy(words).to(device), torch.from_numpy(values).to(device)


@torch.no_grad()
def store_logits(
    directory: Path,
    teacher: Any,
    data: TrainingData,
    *,
    teacher_sha256: str,
    count: int,
    report: Callable[[int, int], None],
) -> None:
    """Run a teacher over all rows once and write its likeliest words.

    Args:
        directory: where to write; it must not exist.
        teacher: the dense model.
        data: rows of token ids.
        teacher_sha256: content hash of its checkpoint.
        count: words a token.
        report: told how many rows of how many are done.

    Raises:
        OutputError: when the directory exists.
        OptionError: when the rows are not plain token ids, or there are fewer words than asked for.
    """
    if os.path.lexists(directory):
        raise OutputError(f"{directory} exists; name another directory for the logits, or remove it")
    parts = [_plain(rows) for rows in (data.training, data.held_out)]
    size = vocabulary_size(teacher)
    if count > size:
        raise OptionError(f"{count} words a token are asked for, the teacher has {size}; ask for fewer")
    # a name that nobody else has
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}.partial")
    temporary.mkdir(parents=True)
    try:
        ends = np.cumsum([rows.size(index) for rows in parts for index in range(len(rows))])
        keys = _write_words(temporary, teacher, parts, ends, count, report)
        np.save(temporary / "ends.npy", ends)
        np.save(temporary / "keys.npy", np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1))
        about = {"format_version": FORMAT_VERSION, "teacher_sha256": teacher_sha256, "words": count, "rows": len(keys)}
        (temporary / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_words(
    directory: Path,
    teacher: Any,
    parts: list[TokenRows],
    ends: np.ndarray,
    count: int,
    report: Callable[[int, int], None],
) -> list[bytes]:
    """Run the teacher; words and their log-probabilities go to disk as they come. Returns the keys of all rows."""
    shape = (int(ends[-1]), count)
    words = np.lib.format.open_memmap(directory / "words.npy", "w+", np.int32, shape)
    values = np.lib.format.open_memmap(directory / "log_probabilities.npy", "w+", np.float16, shape)
    keys: list[bytes] = []
    position = 0
    for rows in parts:
        for first in range(0, len(rows), BATCH_ROWS):
            indices = range(first, min(first + BATCH_ROWS, len(rows)))
            batch = rows.batch(indices, teacher, 0)
            mask = batch["attention_mask"].bool()
            top = teacher(**batch).logits[mask].float().log_softmax(-1).topk(count)
            end = position + len(top.indices)
            words[position:end] = top.indices.cpu().numpy()
            values[position:end] = top.values.cpu().numpy()
            keys += [_key(rows[index]) for index in indices]
            position = end
            report(len(keys), len(ends))
    words.flush()
    values.flush()
    return keys


def _fit(words: Any, values: Any, ends: Any, keys: Any) -> bool:
    """Whether arrays are those of stored logits: words and values a token, an end and a key a row."""
    if not (words.ndim == 2 and words.shape == values.shape and ends.ndim == 1 and keys.ndim == 2):
        return False
    if words.dtype.kind not in "iu" or values.dtype.kind != "f" or ends.dtype.kind != "i" or keys.dtype.kind != "u":
        return False
    return (
        len(keys) == len(ends) > 0 and int(ends[0]) > 0 and bool((np.diff(ends) > 0).all()) and int(ends[-1]) == len(words)
    )


def _plain(rows: Rows) -> TokenRows:
    if not isinstance(rows, TokenRows) or rows.masking is not None:
        raise OptionError("only logits of unmasked text can be stored; distil this model with the teacher in memory")
    return rows


def _key(row: Tensor) -> bytes:
    return hashlib.sha256(row.to(torch.int64).numpy().tobytes()).digest()[:16]
