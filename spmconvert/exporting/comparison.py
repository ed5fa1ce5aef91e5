"""Whether an exported model computes what the converted one does, on one small batch, before the export appears.

Tokens where the model reads them, made-up pictures or sounds where it has a processor for these, nothing otherwise. A model
that reads pictures beside text is compared on both where a converted layer sees pictures.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmconvert.checkpoint.converted import open_converted
from spmconvert.data.media import made_up, media_batch, media_of, media_rows
from spmconvert.data.standin import shows_pictures
from spmconvert.data.tokens import keeps_cache, reads_tokens
from spmconvert.errors import FitError
from spmconvert.outputs.objective import first_states
from spmconvert.outputs.probe import runs_on_tokens, token_batch

CHECKED_TOKENS, CHECKED_ITEMS = 16, 2
# largest difference of an output, relative to the largest output, by the dtype of the model
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Comparison:
    """How two models agreed.

    Attributes:
        difference: largest difference of an output relative to the largest output, None where nothing was compared.
        tolerance: what that may be at most.
        what: on what they were compared, or why not, in words.
    """

    difference: float | None
    tolerance: float
    what: str


def sample_batch(directory: Path, model: Any, layers: Iterable[str] = ()) -> dict[str, Any] | None:
    """Keyword arguments to compare a model on; None where there is nothing that it can be run on.

    Args:
        directory: its checkpoint, for its processor.
        model: loaded.
        layers: names of those that are converted; without any, tokens are enough where the model reads them.
    """
    if reads_tokens(model.config) and not shows_pictures(directory, model.config, layers):
        return token_batch(model, CHECKED_TOKENS) if runs_on_tokens(model) else None
    if media_of(directory, model.config) is None:
        return None
    return media_batch(media_rows(made_up("evaluation", directory, model.config), model.config)[:CHECKED_ITEMS], model)


def reads_more(model: Any) -> str:
    """Why there is nothing to run a model on."""
    name = model.main_input_name
    return f"the model reads {name}{' beside more' if name == 'input_ids' else ''} and has no processor for all of it"


def sample_output(model: Any, batch: dict[str, Any]) -> Tensor:
    """The first output of a model on a batch, float32."""
    # a cache of models without attention cannot say how long it is
    keeps = {"use_cache": False} if "input_ids" in batch and keeps_cache(model.config) else {}
    with torch.no_grad():
        return first_states(model(**{**batch, **keeps})).float()


def compare_loaded(converted: Path, load_converted: Callable[[], Any], load_exported: Callable[[], Any]) -> Comparison:
    """Load and run both models, one at a time.

    Args:
        converted: directory of the converted model.
        load_converted: loads it.
        load_exported: loads the other.

    Raises:
        FitError: when they differ.
    """
    outputs: list[Tensor] = []
    what = ""
    layers = open_converted(converted, recorded=False).layers
    for make in (load_converted, load_exported):
        model = make().eval()
        limit = TOLERANCE.get(model.dtype, max(TOLERANCE.values()))
        batch = sample_batch(converted, model, layers)
        if batch is None:
            return Comparison(None, limit, f"not compared, {reads_more(model)}")
        name = "pixel_values" if "pixel_values" in batch else next(iter(batch))
        what = f"first one on {name} of {' x '.join(str(size) for size in batch[name].shape)}"
        outputs.append(sample_output(model, batch))
        # one model at a time
        del model
        gc.collect()
    return checked(converted, outputs[0], outputs[1], limit, what)


def checked(converted: Path, expected: Tensor, found: Tensor, limit: float, what: str) -> Comparison:
    """The comparison of two outputs.

    Raises:
        FitError: when they differ by more than the limit.
    """
    same_shape = expected.shape == found.shape
    difference = float((expected - found).abs().max() / expected.abs().max()) if same_shape else float("inf")
    if not difference <= limit:
        raise FitError(
            f"the exported model differs from {converted} by {difference:.2g} of its largest output ({what}), "
            f"{limit:g} is allowed; run spmconvert verify on it"
        )
    return Comparison(difference, limit, what)
