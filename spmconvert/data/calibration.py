"""Which rows of a text are fitted, which choose designs, and which only measure.

Rows are drawn with a seed, each part apart from the others, so that no error is ever measured on a row that was fitted, nor
on one that a budget chose designs by: what is chosen as the least on some rows looks better there than it is. How a text
becomes rows is in ``spmconvert.data.tokens``.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.data.documents import content_hash, read_documents
from spmconvert.data.drawn import stand_in_text
from spmconvert.data.tokens import load_tokenizer, padded_batch, reads_text, row_length, token_rows
from spmconvert.data.written import write_text, writes, written_file
from spmconvert.errors import CalibrationError
from spmconvert.recipe.recipe import AUTO_TEXT, Calibration, Recipe


@dataclass(frozen=True)
class CalibrationRows:
    """Token rows for the fit and for measuring errors.

    Attributes:
        fitted: rows whose activations are fitted, each [tokens] (int64).
        choosing: rows that designs are chosen on; none where the recipe names the designs.
        held_out: rows that are only used to measure errors.
        unused: rows of the text that were not drawn.
        padding: token id that fills short rows in a batch.
        batch_size: rows a batch.
        file_sha256: hash of the text file, or of the documents of a dataset.
    """

    fitted: list[Tensor]
    choosing: list[Tensor]
    held_out: list[Tensor]
    unused: list[Tensor]
    padding: int
    batch_size: int
    file_sha256: str

    def batches(self, rows: list[Tensor], model: Any, *, size: int | None = None) -> Iterator[dict[str, Any]]:
        """Padded batches as keyword arguments of the model, on its device; ``batch_size`` rows unless a size is given."""
        size = size or self.batch_size
        for first in range(0, len(rows), size):
            yield padded_batch(rows[first : first + size], self.padding, model)


def with_text(
    recipe: Recipe,
    source: Checkpoint,
    config: Any,
    device: str,
    report: Callable[[int, int], None] | None,
) -> Recipe:
    """The recipe with the file that an ``auto`` text stands for; without a text where the model reads none.

    Args:
        recipe: that may say ``auto``.
        source: the checkpoint.
        config: the model's config.
        device: where it would write its own text.
        report: told how many rows of that are written, and of how many; None takes one that it has written already.
    """
    calibration = recipe.calibration
    if str(calibration.file) != AUTO_TEXT:
        return recipe
    file = _auto_text(source, config, device, report) if reads_text(source.directory, config) else None
    return _with_file(recipe, file)


def _with_file(recipe: Recipe, file: Path | None) -> Recipe:
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"file": file})})


def _auto_text(source: Checkpoint, config: Any, device: str, report: Callable[[int, int], None] | None) -> Path:
    parameters = sum(math.prod(entry.shape) for entry in source.tensors.values())
    if not writes(config, parameters, device):
        return stand_in_text("calibration", source.directory, config)
    if report is not None:
        return write_text(source.directory, source.sha256(), config, device, report)
    written = written_file(source.sha256())
    return written if written.exists() else stand_in_text("calibration", source.directory, config)


def calibration_rows(directory: Path, config: Any, recipe: Recipe) -> CalibrationRows | None:
    """The rows that a recipe asks for, or None where it names no text; as ``load_rows``.

    What still says ``auto`` here, for a model that is converted in memory, is nothing that it would have to write first.
    """
    if str(recipe.calibration.file) == AUTO_TEXT:
        file = stand_in_text("calibration", directory, config) if reads_text(directory, config) else None
        recipe = _with_file(recipe, file)
    if recipe.calibration.file is None:
        return None
    return load_rows(directory, config, recipe.calibration, recipe.seed, choosing=bool(recipe.budget.limits))


def load_rows(
    directory: Path, config: Any, calibration: Calibration, seed: int, *, choosing: bool = False
) -> CalibrationRows:
    """Read, tokenise and split the calibration text.

    Args:
        directory: checkpoint directory, for the tokenizer.
        config: the model's config.
        calibration: what to read; ``file`` must be given.
        seed: seed of the draw.
        choosing: draw rows to choose designs on, as many as are held out.

    Raises:
        CalibrationError: when the text is missing, empty, not UTF-8 or too short, or there is no tokenizer.
    """
    if calibration.file is None:
        raise CalibrationError("no calibration file is given; name one with --calib FILE")
    documents = read_documents(calibration.file)
    tokenizer = load_tokenizer(directory)
    length = row_length(config, calibration.tokens)
    rows = token_rows(documents, tokenizer, config, length, calibration.file)
    measuring = 2 if choosing else 1
    if len(rows) <= measuring:
        uses = "one to fit, one to choose on and one held out" if choosing else "one to fit and one held out"
        raise CalibrationError(
            f"{calibration.file} gives {len(rows)} row{'s' * (len(rows) > 1)} of {length} tokens; {measuring + 1} are "
            f"needed, {uses}: use a longer text or a smaller calibration.tokens"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = max(1, round(calibration.held_out * min(calibration.rows, len(rows))))
    count = min((len(rows) - 1) // measuring, wanted)
    drawn = [rows[i] for i in order]
    fitted_start = measuring * count
    fitted_end = fitted_start + calibration.rows
    return CalibrationRows(
        fitted=drawn[fitted_start:fitted_end],
        choosing=drawn[count:fitted_start],
        held_out=drawn[:count],
        unused=drawn[fitted_end:],
        padding=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        batch_size=calibration.batch_size,
        file_sha256=content_hash(calibration.file, documents),
    )
