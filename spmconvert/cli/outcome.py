"""What convert and finetune end with: the whole model's size, speed and quality beside the dense one's, measured at once.

It is the head of a report. The output is written before, so nothing that happens here loses it; a model that both copies of
would not fit in memory is not measured, and that is said.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from spmconvert.cli import console, progress
from spmconvert.errors import INTERRUPTED_EXIT_CODE, SpmconvertError, first_line
from spmconvert.system.interrupts import at_work
from spmconvert.system.memory import free_memory
from spmconvert.units import size

ROWS, SECONDS = 32, 2.0
# the dense model, the converted one, and what a pass needs, in bytes of the dense checkpoint
NEEDED = 3


def show_outcome(directory: Path, data: str | Path, device: str, *, dense_bytes: int, as_json: bool) -> dict[str, Any]:
    """Measure a checkpoint and print three lines.

    Args:
        directory: converted checkpoint.
        data: text that it is measured on.
        device: where the models run.
        dense_bytes: of the dense checkpoint's tensors.
        as_json: print nothing, since the result is part of something else that is.

    Returns:
        The figures as plain values, for JSON.
    """
    free = free_memory(device)
    if free is not None and NEEDED * dense_bytes > free:
        reason = f"both models take about {size(NEEDED * dense_bytes)} of memory together, {size(free)} is free"
        console.note(f"the whole model is not measured: {reason}; spmconvert report measures it on a larger machine")
        return {"outcome": []}
    import torch

    from spmconvert.commands.report import report
    from spmconvert.reporting.summary import outcome
    from spmconvert.reporting.terminal import outcome_view

    try:
        with at_work(), progress.Steps() as steps:
            found = report(directory, data=data, rows=ROWS, seconds=SECONDS, brief=True, device=device, progress=steps)
    except KeyboardInterrupt:
        console.note(f"interrupted while the whole model was measured; {directory} is complete")
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    except (SpmconvertError, torch.OutOfMemoryError) as error:
        console.note(f"the whole model is not measured: {first_line(error)}")
        return {"outcome": []}
    if not as_json:
        console.show(outcome_view(found))
    return {"outcome": [asdict(figure) for figure in outcome(found)]}
