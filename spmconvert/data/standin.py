"""What stands in where nobody gave data: which of the things that every machine has suits a model, and what to call it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmconvert.data.drawn import stand_in_text
from spmconvert.data.library import Part, library_text
from spmconvert.data.media import made_up, media_of
from spmconvert.data.tokens import reads_text

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
