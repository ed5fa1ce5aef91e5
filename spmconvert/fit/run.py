"""All fits of one conversion, stored one by one, so that a run can be interrupted anywhere and go on to the same bytes.

Only the weight of the layer at work is in memory while layers are fitted, and one block in each of its two forms where fits
follow the blocks, see ``blocks``. Where the layers are in no chain of blocks, the whole model is loaded to be calibrated.
"""

from spmconvert.fit.blocks import fit_in_blocks, is_refined
from spmconvert.fit.layer import LayerRecord
from spmconvert.fit.stored import FitRun, fit_one


def fit_all(run: FitRun) -> tuple[LayerRecord, ...]:
    """Fit and store all that is not stored yet; returns the records of all layers in order."""
    records: dict[str, LayerRecord] = {}
    for layer in run.plan.layers:
        record = run.target.layers.record(layer.target.name)
        if record is not None:
            records[layer.target.name] = LayerRecord(**record)
    if run.recipe.fit.follows_blocks:
        fit_in_blocks(run, records)
    else:
        # fits on the dense model's activations need no model
        run.dense.release()
        for layer in run.plan.layers:
            if layer.target.name not in records:
                records[layer.target.name] = fit_one(run, layer)
                run.progress.fitted(records[layer.target.name], len(records), len(run.plan.layers))
    return tuple(records[layer.target.name] for layer in run.plan.layers)


def is_finished(run: FitRun) -> bool:
    """Whether all layers of the plan are stored, and refined where they are to be."""
    fitted = all(run.target.layers.record(layer.target.name) is not None for layer in run.plan.layers)
    return fitted and (not run.recipe.fit.refine or is_refined(run))
