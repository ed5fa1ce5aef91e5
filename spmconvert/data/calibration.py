"""Which rows of a text are fitted, which choose designs, and which only measure.

Rows are drawn with a seed, each part apart from the others, so that no error is ever measured on a row that was fitted, nor
on one that a budget chose designs by: what is chosen as the least on some rows looks better there than it is. How a text
becomes rows is in ``spmconvert.data.tokens``.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.data.documents import content_hash, read_documents
from spmconvert.data.media import TENSOR_SUFFIX, MediaRow, folder_inputs, media_rows
from spmconvert.data.rows import Row, row_batch
from spmconvert.data.standin import StandIn, stand_in, written_stand_in
from spmconvert.data.tokens import check_reads_text, load_tokenizer, row_length, token_rows
from spmconvert.errors import CalibrationError
from spmconvert.recipe.recipe import AUTO_TEXT, Calibration, Recipe


@dataclass(frozen=True)
class CalibrationRows:
    """Rows for the fit and for measuring errors.

    Attributes:
        fitted: rows whose activations are fitted, each token ids or an item of a processor's tensors.
        choosing: rows that designs are chosen on; none where the recipe names the designs.
        held_out: rows that are only used to measure errors.
        unused: rows that were not drawn.
        padding: token id that fills short rows in a batch.
        batch_size: rows a batch.
        file_sha256: hash of the file, or of the documents of a dataset.
    """

    fitted: list[Row]
    choosing: list[Row]
    held_out: list[Row]
    unused: list[Row]
    padding: int
    batch_size: int
    file_sha256: str

    @property
    def fitted_tokens(self) -> int | None:
        """Tokens of the rows that are fitted; None for pictures and sounds, of which the model makes its own number."""
        if any(isinstance(row, MediaRow) for row in self.fitted):
            return None
        return sum(len(row) for row in self.fitted)

    def batches(self, rows: list[Row], model: Any, *, size: int | None = None) -> Iterator[dict[str, Any]]:
        """Padded batches as keyword arguments of the model, on its device; ``batch_size`` rows unless a size is given."""
        size = size or self.batch_size
        for first in range(0, len(rows), size):
            yield row_batch(rows[first : first + size], self.padding, model)


def with_inputs(
    recipe: Recipe,
    source: Checkpoint,
    config: Any,
    device: str,
    report: Callable[[int, int], None] | None,
    layers: Iterable[str],
) -> tuple[Recipe, StandIn | None]:
    """The recipe with the file that ``auto`` or a folder stands for; without one where nothing can stand in.

    Args:
        recipe: that may say ``auto``.
        source: the checkpoint.
        config: the model's config.
        device: where it would write its own text.
        report: told how many rows of that are written, and of how many; None takes one that it has written already.
        layers: names of those that are converted.

    Returns:
        The recipe, and what stands in where it says ``auto``.
    """
    if str(recipe.calibration.file) != AUTO_TEXT:
        return _with_folder(recipe, source.directory, config), None
    layers = list(layers)
    written = written_stand_in("calibration", source, config, layers, device, report)
    found = written or stand_in("calibration", source.directory, config, layers)
    return _with_file(recipe, None if found is None else found.file), found


def _with_folder(recipe: Recipe, directory: Path, config: Any) -> Recipe:
    file = recipe.calibration.file
    return _with_file(recipe, folder_inputs(file, directory, config)) if file is not None and file.is_dir() else recipe


def _with_file(recipe: Recipe, file: Path | None) -> Recipe:
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"file": file})})


def calibration_rows(directory: Path, config: Any, recipe: Recipe, layers: Iterable[str] = ()) -> CalibrationRows | None:
    """The rows that a recipe asks for, or None where it names no text; as ``load_rows``.

    What still says ``auto`` here, for a model that is converted in memory, is nothing that it would have to write first.
    """
    if str(recipe.calibration.file) == AUTO_TEXT:
        found = stand_in("calibration", directory, config, layers)
        recipe = _with_file(recipe, None if found is None else found.file)
    recipe = _with_folder(recipe, directory, config)
    if recipe.calibration.file is None:
        return None
    return load_rows(directory, config, recipe.calibration, recipe.seed, choosing=bool(recipe.budget.limits))


def load_rows(
    directory: Path, config: Any, calibration: Calibration, seed: int, *, choosing: bool = False
) -> CalibrationRows:
    """Read, tokenise and split the calibration text; or split the items of a file of tensors.

    Args:
        directory: checkpoint directory, for the tokenizer.
        config: the model's config.
        calibration: what to read; ``file`` must be given.
        seed: seed of the draw.
        choosing: draw rows to choose designs on, as many as are held out.

    Raises:
        CalibrationError: when the file is missing, empty, not UTF-8 or too short, there is no tokenizer, or the model
            reads no text.
    """
    if calibration.file is None:
        raise CalibrationError("no calibration file is given; name one with --calib FILE")
    rows, padding, digest = _read_rows(calibration.file, directory, config, calibration.tokens)
    measuring = 2 if choosing else 1
    if len(rows) <= measuring:
        uses = "one to fit, one to choose on and one held out" if choosing else "one to fit and one held out"
        length = "" if isinstance(rows[0], MediaRow) else f" of {len(rows[0])} tokens"
        raise CalibrationError(
            f"{calibration.file} gives {len(rows)} row{'s' * (len(rows) > 1)}{length}; {measuring + 1} are "
            f"needed, {uses}: use more of it or a smaller calibration.tokens"
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
        padding=padding,
        batch_size=calibration.batch_size,
        file_sha256=digest,
    )


def _read_rows(file: Path, directory: Path, config: Any, tokens: int) -> tuple[list[Row], int, str]:
    """All rows of a file, the token id that fills short ones, and the file's hash."""
    if file.suffix == TENSOR_SUFFIX:
        return list(media_rows(file, config)), 0, content_hash(file)
    check_reads_text(directory, config, file)
    documents = read_documents(file)
    tokenizer = load_tokenizer(directory)
    rows = token_rows(documents, tokenizer, config, row_length(config, tokens), file)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return list(rows), padding, content_hash(file, documents)
