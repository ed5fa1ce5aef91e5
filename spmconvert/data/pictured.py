"""Pictures with a text beside each, for models that read both: what their own processor makes of a question and an answer.

The text is prose that every Python installation has, and says nothing about the picture. It fills the positions behind the
picture with words, so that the layers behind see both. Pictures are brought to one size, since rows are to be of one shape.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spmconvert.data.library import Part, library_text
from spmconvert.errors import CalibrationError, first_line
from spmconvert.model.architecture import model_class

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# pixels of a side
SIDE = 224
# characters of prose behind a picture
CHARACTERS = 400
QUESTION = "What is this?"
# of models whose pictures are a list of patches without an axis of items
GRID = "image_grid_thw"

Picture = np.ndarray[Any, Any]


def reads_pictures_beside_text(directory: Path, config: Any) -> bool:
    """Whether a checkpoint's model reads pictures and text, and has a processor for both."""
    if getattr(config, "vision_config", None) is None or not any((directory / name).is_file() for name in PROCESSOR_FILES):
        return False
    architecture = model_class(config)
    return side_by_side(config) or (architecture.main_input_name == "input_ids" and architecture.can_generate())


def side_by_side(config: Any) -> bool:
    """Whether a model has a tower for text beside one for pictures, and compares what they say, as CLIP does."""
    architecture = model_class(config)
    towers = all(getattr(config, f"{name}_config", None) is not None for name in ("text", "vision"))
    takes = {"input_ids", "pixel_values"} <= set(inspect.signature(architecture.forward).parameters)
    return towers and takes and not architecture.can_generate()


def pictured(
    pictures: Sequence[Picture], first: int, part: Part, processor: Any, directory: Path, config: Any
) -> dict[str, Tensor]:
    """Pictures with a text each, as the model takes them: [items, ...] by name.

    Args:
        pictures: [height, width, 3] (uint8) each.
        first: number of the first one among all, which the text goes by.
        part: of the prose.
        processor: the checkpoint's, of pictures and text.
        directory: checkpoint, for errors.
        config: of the model.

    Raises:
        CalibrationError: when the processor fails.
    """
    lines = library_text(part).read_text(encoding="utf-8").splitlines()
    known = inspect.signature(model_class(config).forward).parameters
    looks: Any = getattr(processor, "image_processor", None)
    if getattr(looks, "do_image_splitting", False):
        # one view of each: a dozen tiles beside it would be the same layers on gigabytes
        looks.do_image_splitting = False
    rows = []
    for number, picture in enumerate(pictures, first):
        prose = " ".join(lines[(3 * number + offset) % len(lines)] for offset in range(3))[:CHARACTERS]
        try:
            found = _processed(processor, prose, picture, config)
        except Exception as error:
            # processors raise whatever the libraries under them raise
            raise CalibrationError(
                f"the processor of {directory} fails on a picture and a text: {first_line(error)}; give its tensors as "
                "FILE.safetensors"
            ) from error
        # of labels a model would make a loss that nobody asks for
        wanted = known.keys() - {"labels"}
        tensors = {name: tensor for name, tensor in found.items() if name in wanted and isinstance(tensor, Tensor)}
        patches = GRID in tensors
        rows.append({name: value if patches and name == "pixel_values" else value[0] for name, value in tensors.items()})
    return _stacked(rows, getattr(getattr(processor, "tokenizer", None), "pad_token_id", None) or 0, directory)


def _processed(processor: Any, prose: str, picture: Picture, config: Any) -> Any:
    """What a processor makes of a picture and words: behind it, or beside it as long as the other tower reads."""
    if not side_by_side(config):
        return processor(text=_asked(processor, prose), images=_square(picture), return_tensors="pt")
    length = {"padding": "max_length", "truncation": True, "max_length": config.text_config.max_position_embeddings}
    return processor(text=prose, images=_square(picture), return_tensors="pt", **length)


def _asked(processor: Any, prose: str) -> str:
    """A picture, a question and prose as the answer, in the model's own form."""
    if getattr(processor, "chat_template", None):
        asked = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        answer = [{"type": "text", "text": prose}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        text: str = processor.apply_chat_template(messages, tokenize=False)
        return text
    return f"{getattr(processor, 'image_token', '<image>')} {QUESTION} {prose}"


def _square(picture: Picture) -> Any:
    from PIL import Image

    return Image.fromarray(picture).resize((SIDE, SIDE))


def _stacked(rows: list[dict[str, Tensor]], padding: int, directory: Path) -> dict[str, Tensor]:
    """Rows on one axis, those of tokens filled up at their ends."""
    names = set.intersection(*(set(row) for row in rows))
    tokens = {name for name in names if rows[0][name].ndim == 1 and len(rows[0][name]) == len(rows[0]["input_ids"])}
    stacked = {}
    for name in sorted(names):
        parts = [row[name] for row in rows]
        if name in tokens:
            fill = padding if name == "input_ids" else 0
            stacked[name] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)
        elif len({part.shape for part in parts}) > 1:
            shapes = sorted({tuple(part.shape) for part in parts})
            raise CalibrationError(
                f"the processor of {directory} makes {name} of several shapes, {shapes[0]} and {shapes[-1]}; give its "
                "tensors as FILE.safetensors"
            )
        else:
            stacked[name] = torch.stack(parts)
    return stacked


def joined(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch [items, ...] as the model takes it: without an axis of items where pictures are lists of patches."""
    if GRID not in batch:
        return batch
    return {**batch, "pixel_values": batch["pixel_values"].flatten(0, 1)}
