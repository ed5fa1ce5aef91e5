"""Which rows of a text, or items of a file of tensors, may be called unseen.

Quality is never measured on rows that a fit or a finetune has used. A text is known by its hash:

- the calibration text: rows that the conversion did not fit, found by drawing again with the recorded recipe and seed;
- a text that a finetune used: none. Its training rows were learned, and its held-out rows chose the state that was kept;
- any other text: rows drawn from the whole of it.

What it gives up: a copy of a used text with one changed byte is another text to this module.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spmconvert.checkpoint.converted import Converted
from spmconvert.data.calibration import CalibrationRows, load_rows
from spmconvert.data.documents import content_hash, read_documents
from spmconvert.data.media import TENSOR_SUFFIX, folder_inputs, media_rows
from spmconvert.data.rows import Row, row_key
from spmconvert.data.tokens import check_reads_text, load_tokenizer, row_length, token_rows
from spmconvert.recipe.loading import recorded_recipe
from spmconvert.reporting.schema import NotMeasured

Domain = Literal["first", "other"]
SEED = 0
ROW_TOKENS = 128
OPTIONS: dict[Domain, str] = {"first": "--data", "other": "--other-data"}


@dataclass(frozen=True)
class EvaluationRows:
    """Unseen rows of one text.

    Attributes:
        name: what it is called: the file's name, or what stands in for one.
        domain: which of the two texts it is.
        sha256: its hash.
        rows: each token ids [tokens] (int64), or an item of a processor's tensors.
        padding: token id that fills short rows.
        origin: where the rows come from, in words.
    """

    name: str
    domain: Domain
    sha256: str
    rows: list[Row]
    padding: int
    origin: str

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows; 0 where they are none of tokens."""
        return sum(len(row) for row in self.rows if isinstance(row, Tensor))


def evaluation_rows(
    converted: Converted, config: Any, file: Path, domain: Domain, *, count: int, name: str | None = None
) -> EvaluationRows | NotMeasured:
    """Rows of a text that may measure quality, or why there are none.

    Args:
        converted: that is measured.
        config: its model's.
        file: a text, a folder of pictures or sounds, or a file of tensors.
        domain: which of the two texts it is.
        count: most rows.
        name: what to call it; None for the file's name.

    Raises:
        CalibrationError: when the file cannot be read as a text.
    """
    name = file.name if name is None else name
    what = f"quality on {name}"
    if file.is_dir():
        file = folder_inputs(file, converted.directory, config)
    digest = content_hash(file)
    if any(run.get("data_sha256") == digest for run in converted.provenance.get("finetune", [])):
        return NotMeasured(
            what=what,
            reason="a finetune of this model used the text: on seen rows there is no quality to measure",
            remedy=f"give a text that was not trained on with {OPTIONS[domain]}",
        )
    calibration = converted.provenance.get("calibration") or {}
    if calibration.get("file_sha256") == digest:
        return _rows_not_fitted(converted, config, file, domain, name, count)
    rows, padding = _read_rows(converted.directory, config, file)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED)).tolist()
    chosen = [rows[index] for index in sorted(order[:count])]
    return EvaluationRows(
        name, domain, digest, chosen, padding, f"{len(chosen)} of {len(rows)} rows, drawn with seed {SEED}"
    )


def _read_rows(directory: Path, config: Any, file: Path) -> tuple[list[Row], int]:
    """All rows of a file, and the token id that fills short ones."""
    if file.suffix == TENSOR_SUFFIX:
        return list(media_rows(file, config)), 0
    check_reads_text(directory, config, file)
    tokenizer = load_tokenizer(directory)
    rows = token_rows(read_documents(file), tokenizer, config, row_length(config, ROW_TOKENS), file)
    return list(rows), tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def recorded_rows(converted: Converted, config: Any, file: Path) -> CalibrationRows | None:
    """The rows that the conversion drew, from its calibration text at the given place; None where they come out otherwise.

    Raises:
        CalibrationError: when the file cannot be read as a text.
    """
    recipe = recorded_recipe(converted.provenance["recipe"])
    calibration = recipe.calibration.model_copy(update={"file": file})
    choosing = bool(recipe.budget.limits)
    rows = load_rows(converted.directory, config, calibration, recipe.seed, choosing=choosing)
    recorded = converted.provenance["calibration"]
    counts = {"fitted_rows": rows.fitted, "choosing_rows": rows.choosing, "held_out_rows": rows.held_out}
    same = all(recorded[key] == len(part) for key, part in counts.items())
    return rows if same and rows.file_sha256 == recorded["file_sha256"] else None


def _rows_not_fitted(
    converted: Converted, config: Any, file: Path, domain: Domain, name: str, count: int
) -> EvaluationRows | NotMeasured:
    what = f"quality on {name}"
    rows = recorded_rows(converted, config, file)
    if rows is None:
        return NotMeasured(
            what=what,
            reason="it is the calibration text, and its split into fitted and held-out rows cannot be drawn again",
            remedy=f"give another text with {OPTIONS[domain]}",
        )
    # lines such as headings may occur many times in a text
    seen = {row_key(row) for row in (*rows.fitted, *rows.choosing)}
    unseen = [row for row in (*rows.held_out, *rows.unused) if row_key(row) not in seen]
    if not unseen:
        return NotMeasured(
            what=what,
            reason="it is the calibration text, and every row of it was fitted",
            remedy=f"give another text with {OPTIONS[domain]}",
        )
    used = f"fitted {len(rows.fitted)}" + (f" and chose designs on {len(rows.choosing)}" if rows.choosing else "")
    origin = f"{min(count, len(unseen))} of {len(unseen)} rows that the conversion did not use; it {used}"
    return EvaluationRows(name, domain, rows.file_sha256, unseen[:count], rows.padding, origin)
