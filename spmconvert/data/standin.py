"""What stands in where nobody gave data: which of the things that every machine has suits a model, and what to call it."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.data.drawn import stand_in_text
from spmconvert.data.library import Part, library_text
from spmconvert.data.media import made_up, media_of
from spmconvert.data.tokens import reads_text
from spmconvert.data.written import write_text, writes, written_file
from spmconvert.system.caches import keep

PROSE = "docstrings of the Python installation"


@dataclass(frozen=True)
class StandIn:
    """What stands in.

    Attributes:
        file: a text, or a processor's tensors, in the cache.
        what: what it holds, in words.
        better: what would be better, in words.
    """

    file: Path
    what: str
    better: str = "a text like what the model is used for is far better"


WRITTEN = "what the model writes itself"


def written_stand_in(
    part: Part, source: Checkpoint, config: Any, device: str, report: Callable[[int, int], None] | None
) -> StandIn | None:
    """What a model writes itself, to train on with prose and drawn words beside it; None where it writes nothing.

    Args:
        part: calibration or training.
        source: the dense checkpoint.
        config: the model's config.
        device: where it would write.
        report: told how many rows are written, and of how many; None takes what it has written already.

    Raises:
        CalibrationError: when its tokenizer cannot be used.
        NotWritableError: when the cache cannot be written.
    """
    parameters = sum(math.prod(entry.shape) for entry in source.tensors.values())
    if not reads_text(source.directory, config) or not writes(config, parameters, device):
        return None
    file = written_file(part, source.sha256())
    if report is not None:
        file = write_text(part, source.directory, source.sha256(), config, device, report)
    if not file.exists():
        return None
    if part == "calibration":
        return StandIn(file, WRITTEN)
    beside = stand_in(part, source.directory, config)
    return StandIn(file, WRITTEN) if beside is None else StandIn(_mixed(beside.file, file), f"{beside.what}, and {WRITTEN}")


def _mixed(prose: Path, written: Path) -> Path:
    """A .jsonl file with the rows of both in random order."""
    file = written.with_name(f"{written.stem}-{prose.stem}.jsonl")
    if not file.exists():
        rows = [json.dumps({"text": row}) for row in prose.read_text(encoding="utf-8").splitlines()]
        rows += written.read_text(encoding="utf-8").splitlines()
        random.Random(prose.stem).shuffle(rows)
        keep(file, "\n".join(rows) + "\n")
    return file


def stand_in(part: Part, directory: Path, config: Any) -> StandIn | None:
    """What a model is calibrated, trained or measured on where nobody gave anything; None where nothing suits it.

    Args:
        part: what it is for; no row is in two parts.
        directory: checkpoint, for its tokenizer or its processor.
        config: the model's config.

    Raises:
        CalibrationError: when its tokenizer or processor cannot be used.
        NotWritableError: when the cache cannot be written.
    """
    if reads_text(directory, config):
        prose = library_text(part)
        file = prose if part == "evaluation" else stand_in_text(part, directory, config)
        return StandIn(file, PROSE if file == prose else f"{PROSE}, and words drawn from the tokenizer's vocabulary")
    kind = media_of(directory, config)
    if kind is None:
        return None
    better = f"a folder of {kind} like those that the model is used on is far better"
    return StandIn(made_up(part, directory, config), f"made-up {kind}", better)
