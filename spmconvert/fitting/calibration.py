"""From a text file to batches of token ids for the calibration run.

A document is a non-empty line of a .txt file or the ``text`` of a .jsonl line; lines shorter than a few words (headings,
captions) are left out. Masked and encoder models see one document a row, cut at the row length; causal and
encoder-decoder models see documents joined by the end-of-text token and cut into full rows, as they were trained.
Rows are drawn with a seed, and the held-out rows are drawn apart from the fitted ones, so that no error is ever measured
on a row that was fitted.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmconvert.errors import CalibrationError
from spmconvert.recipe import Calibration

SHORTEST_DOCUMENT = 64
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "spiece*")


@dataclass(frozen=True)
class CalibrationRows:
    """Token rows for the fit and for measuring errors.

    Attributes:
        fitted: rows whose activations are fitted, each [tokens] (int64).
        held_out: rows that are only used to measure errors.
        padding: token id that fills short rows in a batch.
        batch_size: rows a batch.
        file_sha256: hash of the text file.
    """

    fitted: list[Tensor]
    held_out: list[Tensor]
    padding: int
    batch_size: int
    file_sha256: str

    def batches(self, rows: list[Tensor], model: Any) -> Iterator[dict[str, Any]]:
        """Padded batches as keyword arguments of the model, on its device."""
        for first in range(0, len(rows), self.batch_size):
            chunk = rows[first : first + self.batch_size]
            ids = torch.nn.utils.rnn.pad_sequence(chunk, batch_first=True, padding_value=self.padding)
            lengths = torch.tensor([len(row) for row in chunk])
            mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
            batch: dict[str, Any] = {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}
            if hasattr(model.config, "use_cache"):
                batch["use_cache"] = False
            if model.config.is_encoder_decoder:
                batch["decoder_input_ids"] = batch["input_ids"]
            yield batch


def load_rows(directory: Path, config: Any, calibration: Calibration, seed: int) -> CalibrationRows:
    """Read, tokenise and split the calibration text.

    Args:
        directory: checkpoint directory, for the tokenizer.
        config: the model's config.
        calibration: what to read; ``file`` must be given.
        seed: seed of the draw.

    Raises:
        CalibrationError: when the text is missing, empty, not UTF-8 or too short, or there is no tokenizer.
    """
    if calibration.file is None:
        raise CalibrationError("no calibration file is given; name one with --calib FILE")
    documents = read_documents(calibration.file)
    tokenizer = _tokenizer(directory)
    length = min(calibration.tokens, getattr(config, "max_position_embeddings", None) or calibration.tokens)
    if _reads_packed(config):
        rows = _packed(documents, tokenizer, length, calibration.file)
    else:
        encoded = tokenizer(documents, truncation=True, max_length=length)["input_ids"]
        rows = [torch.tensor(ids) for ids in encoded]
    wanted_held_out = max(1, round(calibration.held_out * calibration.rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out_count = min(wanted_held_out, max(1, round(calibration.held_out * len(rows))))
    chosen = [rows[i] for i in order[: calibration.rows + held_out_count]]
    if len(chosen) < 2:
        raise CalibrationError(
            f"{calibration.file} gives {len(rows)} row of {length} tokens; 2 are needed, one to fit and one held out: "
            "use a longer text or a smaller calibration.tokens"
        )
    digest = hashlib.sha256(calibration.file.read_bytes()).hexdigest()
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return CalibrationRows(chosen[held_out_count:], chosen[:held_out_count], padding, calibration.batch_size, digest)


def read_documents(file: Path) -> list[str]:
    """Documents of a .txt or .jsonl file.

    Raises:
        CalibrationError: when the file cannot be read, has another form, or holds no document.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration file {file} is not UTF-8 at byte {error.start}; convert it to UTF-8") from None
    except OSError as error:
        raise CalibrationError(f"calibration file {file} cannot be read: {error.strerror}; check the path") from None
    if file.suffix == ".jsonl":
        lines = [_text_of(line, number, file) for number, line in enumerate(lines, 1) if line.strip()]
    elif file.suffix not in ("", ".txt", ".md", ".raw", ".tokens"):
        raise CalibrationError(f"calibration file {file} has the form {file.suffix}; give a .txt or a .jsonl file")
    stripped = [line.strip() for line in lines if line.strip()]
    if not stripped:
        raise CalibrationError(f"calibration file {file} is empty; give a text of at least a few hundred lines")
    return [line for line in stripped if len(line) >= SHORTEST_DOCUMENT] or stripped


def _text_of(line: str, number: int, file: Path) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        raise CalibrationError(f"line {number} of {file} is not JSON; give one object a line") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise CalibrationError(f"line {number} of {file} has no key 'text'; name the column of the documents text")
    return record["text"]


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    # without files transformers may answer with a tokenizer of no words
    if not any(next(directory.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise CalibrationError(f"{directory} has no tokenizer files; calibration needs text, convert with --calib none")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:
        # transformers raises whatever its converters raise; all of it means that text cannot be tokenised here
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(
            f"{directory} has no usable tokenizer ({first}); calibration needs text, convert with --calib none"
        ) from error


def _reads_packed(config: Any) -> bool:
    architecture = (getattr(config, "architectures", None) or [""])[0]
    generates = architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    return bool(config.is_encoder_decoder or generates)


def _packed(documents: list[str], tokenizer: Any, length: int, file: Path) -> list[Tensor]:
    separator = tokenizer.eos_token_id
    stream: list[int] = []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        stream += ids if separator is None else [*ids, separator]
    if len(stream) < length:
        raise CalibrationError(
            f"{file} has {len(stream)} tokens, one row has {length}; use a longer text or a smaller calibration.tokens"
        )
    return [torch.tensor(stream[start : start + length]) for start in range(0, len(stream) - length + 1, length)]
