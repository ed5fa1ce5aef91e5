"""What a converted model answers to fixed tokens, so that another machine or a later version can be compared with it."""

from typing import Any

import torch

from spmconvert.errors import CorruptCheckpointError
from spmconvert.outputs.probe import first_output, token_batch
from spmconvert.reporting.schema import RecordedOutput

RECORDED_TOKENS = 16
RECORDED_VALUES = 8
# relative to the largest recorded value; sums in another order on another machine stay far below
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def record_output(model: Any) -> RecordedOutput:
    """Record what a model answers to fixed tokens."""
    tokens = token_batch(model, RECORDED_TOKENS)["input_ids"][0].tolist()
    tolerance = TOLERANCE.get(model.dtype, max(TOLERANCE.values()))
    return RecordedOutput(tokens=tuple(tokens), values=tuple(recorded_values(model, tokens)), tolerance=tolerance)


def recorded_values(model: Any, tokens: list[int]) -> list[float]:
    """The first values of the last position's output on one row of tokens.

    Raises:
        CorruptCheckpointError: when the output is not finite.
    """
    output = first_output(model, torch.tensor([tokens], device=model.device))
    if not output.isfinite().all():
        raise CorruptCheckpointError(
            f"the outputs of {model.config._name_or_path} are not finite; run spmconvert verify on it, or convert again"
        )
    return output.reshape(-1, output.shape[-1])[-1, :RECORDED_VALUES].tolist()
