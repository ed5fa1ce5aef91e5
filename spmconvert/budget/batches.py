"""Which candidates are measured together on a GPU, and in which order, so that no two processes write one layer's file.

Batches are formed from known designs, too, so that a search that goes on from another one and asks for the same forms the
same. What it gives up: forms are tried on two layers of a shape before they go on to the others, so many batches are small.
"""

from collections.abc import Sequence

from spmconvert.budget.curves import LayerCurve
from spmconvert.budget.search import Trial
from spmconvert.fit.batches import in_batches
from spmconvert.operator.design import Design

Batch = list[tuple[LayerCurve, Design]]


def waves_of(trials: Sequence[Trial], device: str, size: int | None = None) -> list[list[Batch]]:
    """Batches in which a design is not known, in waves that have all designs of a layer in one batch.

    Args:
        trials: designs of layers.
        device: where they are fitted.
        size: members of a batch, in place of what the device has room for.
    """
    pairs = [(curve, design) for curve, designs in trials for design in designs]
    waves: list[tuple[list[Batch], set[str]]] = []
    for batch in in_batches(pairs, lambda pair: pair[1], device, size):
        if all(curve.knows(design) for curve, design in batch):
            continue
        names = {curve.layer.target.name for curve, _ in batch}
        wave = next((wave for wave in waves if not wave[1] & names), None)
        if wave is None:
            waves.append(([batch], names))
        else:
            wave[0].append(batch)
            wave[1].update(names)
    return [batches for batches, _ in waves]
