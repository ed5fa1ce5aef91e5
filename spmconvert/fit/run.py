"""All fits of one conversion, stored one by one, so that a run can be interrupted anywhere and go on to the same bytes.

Only the weight of the layer at work is in memory while layers are fitted, and one block in each of its two forms where fits
follow the blocks, see ``blocks``. Where the layers are in no chain of blocks, the whole model is loaded to be calibrated.

On a GPU layers of one shape that follow no other are solved together (``batches``), and as many weights are in memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

from spmconvert.fit.blocks import fit_in_blocks, is_refined
from spmconvert.fit.layer import LayerRecord, stored_record
from spmconvert.fit.stored import FitRun, fit_together, kept_batches
from spmconvert.plan.plan import LayerPlan


def fit_all(run: FitRun, together: Callable[[str, Any], None]) -> tuple[LayerRecord, ...]:
    """Fit and store all that is not stored yet.

    Args:
        run: what is fitted.
        together: has everybody do the work ``fits`` on a list of batches of layers.

    Returns:
        The records of all layers in order.
    """
    records = _stored_records(run)
    if run.recipe.fit.follows_blocks:
        fit_in_blocks(run, records)
    elif len(records) < len(run.plan.layers):
        batches = kept_batches(run, [run.plan.layers])
        together("fits", [batch for batch in batches if any(layer.target.name not in records for layer in batch)])
        records = _stored_records(run)
    return tuple(records[layer.target.name] for layer in run.plan.layers)


def fit_share(run: FitRun, batches: Sequence[Sequence[LayerPlan]]) -> None:
    """Fit and store this process's share of batches of layers, each layer on the dense model's activations."""
    # these need no model
    run.dense.release()
    share, done = run.team.share(batches), 0
    total = sum(run.target.layers.record(layer.target.name) is None for batch in share for layer in batch)
    for batch in share:
        for record in fit_together(run, batch):
            done += 1
            run.progress.fitted(record, done, total)


def _stored_records(run: FitRun) -> dict[str, LayerRecord]:
    found = {layer.target.name: run.target.layers.record(layer.target.name) for layer in run.plan.layers}
    return {name: stored_record(record) for name, record in found.items() if record is not None}


def is_finished(run: FitRun) -> bool:
    """Whether all layers of the plan are stored, and refined where they are to be."""
    fitted = all(run.target.layers.record(layer.target.name) is not None for layer in run.plan.layers)
    return fitted and (not run.recipe.fit.refine or is_refined(run))
