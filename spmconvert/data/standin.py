"""What stands in where nobody gave data: which of the things that every machine has suits a model, and what to call it.

A model that reads pictures beside text is shown pictures where a layer that sees them is converted. Elsewhere it is given
text alone, which a language model of its size is trained on too, and which takes a fraction of the time.
"""

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.data.drawn import stand_in_text
from spmconvert.data.library import Part, library_text
from spmconvert.data.media import MADE_UP, made_up, media_of
from spmconvert.data.pictured import reads_pictures_beside_text
from spmconvert.data.tokens import has_tokenizer, reads_text
from spmconvert.data.written import write_text, writes, written_file
from spmconvert.model.architecture import skeleton
from spmconvert.model.towers import beyond_text
from spmconvert.system.caches import cache_directory, keep

PROSE = "prose that comes with spmconvert, and docstrings of Python"


@dataclass(frozen=True)
class StandIn:
    """What stands in.

    Attributes:
        file: a text, or a processor's tensors, in the cache.
        what: what it holds, in words.
        better: what it leaves out, and what would be better, in words.
    """

    file: Path
    what: str
    better: str = "a text like what the model is used for is far better"


WRITTEN = "what the model writes itself"


def is_stand_in(file: Path) -> bool:
    """Whether a file is one that stands in, by its place."""
    folder = file.resolve().parent
    if folder == cache_directory("inputs").resolve():
        # beside tensors of folders that somebody gave
        return file.name.startswith(MADE_UP)
    return folder == cache_directory("texts").resolve()


def written_stand_in(
    part: Part,
    source: Checkpoint,
    config: Any,
    layers: Iterable[str],
    device: str,
    report: Callable[[int, int], None] | None,
) -> StandIn | None:
    """What a model writes itself, to train on with prose and drawn words beside it; None where it writes nothing.

    Args:
        part: calibration or training.
        source: the dense checkpoint.
        config: the model's config.
        layers: names of those that are converted.
        device: where it would write.
        report: told how many rows are written, and of how many; None takes what it has written already.

    Raises:
        CalibrationError: when its tokenizer cannot be used.
        NotWritableError: when the cache cannot be written.
    """
    parameters = sum(math.prod(entry.shape) for entry in source.tensors.values())
    if not reads_text(source.directory, config) or not writes(config, parameters, device):
        return None
    if shows_pictures(source.directory, config, layers):
        return None
    file = written_file(part, source.sha256())
    if report is not None:
        file = write_text(part, source.directory, source.sha256(), config, device, report)
    if not file.exists():
        return None
    beside = None if part == "calibration" else stand_in(part, source.directory, config, layers)
    better = better_text(source.directory, config)
    if beside is None:
        return StandIn(file, WRITTEN, better)
    return StandIn(_mixed(beside.file, file), _beside(beside.what, WRITTEN), better)


def _beside(what: str, more: str) -> str:
    """A list of what a text holds, with one more."""
    return f"{what.replace(', and ', ', ')}, and {more}"


def _mixed(prose: Path, written: Path) -> Path:
    """A .jsonl file with the rows of both in random order."""
    file = written.with_name(f"{written.stem}-{prose.stem}.jsonl")
    if not file.exists():
        rows = [json.dumps({"text": row}) for row in prose.read_text(encoding="utf-8").splitlines()]
        rows += written.read_text(encoding="utf-8").splitlines()
        random.Random(prose.stem).shuffle(rows)
        keep(file, "\n".join(rows) + "\n")
    return file


def shows_pictures(directory: Path, config: Any, layers: Iterable[str]) -> bool:
    """Whether pictures go beside the text: the checkpoint has a processor for both, and text alone misses some layer.

    Args:
        directory: checkpoint, for its processor.
        config: the model's config.
        layers: names of those that are converted.
    """
    both = reads_text(directory, config) and reads_pictures_beside_text(directory, config)
    return both and beyond_text(skeleton(config), layers)


def stand_in(part: Part, directory: Path, config: Any, layers: Iterable[str] = ()) -> StandIn | None:
    """What a model is calibrated, trained or measured on where nobody gave anything; None where nothing suits it.

    Args:
        part: what it is for; no row is in two parts.
        directory: checkpoint, for its tokenizer or its processor.
        config: the model's config.
        layers: names of those that are converted.

    Raises:
        CalibrationError: when its tokenizer or processor cannot be used.
        NotWritableError: when the cache cannot be written.
    """
    if shows_pictures(directory, config, layers):
        better = "a folder of pictures like those that the model is used on is far better"
        return StandIn(made_up(part, directory, config), f"made-up pictures, each beside {PROSE}", better)
    if reads_text(directory, config):
        prose = library_text(part)
        file = prose if part == "evaluation" else stand_in_text(part, directory, config)
        what = PROSE if file == prose else _beside(PROSE, "words drawn from the tokenizer's vocabulary")
        return StandIn(file, what, better_text(directory, config))
    kind = media_of(directory, config)
    if kind is None or (kind == "pictures with text" and not has_tokenizer(directory)):
        return None
    better = f"a folder of {kind.partition(' ')[0]} like those that the model is used on is far better"
    return StandIn(made_up(part, directory, config), f"made-up {kind}", better)


def better_text(directory: Path, config: Any) -> str:
    """What would be better than a text that stands in, and why no pictures are beside it where some could be."""
    if getattr(config, "vision_config", None) is None:
        return StandIn.better
    reason = (
        "as text reaches all that is converted"
        if reads_pictures_beside_text(directory, config)
        else "for want of a processor"
    )
    return f"without pictures, {reason}; {StandIn.better}"
