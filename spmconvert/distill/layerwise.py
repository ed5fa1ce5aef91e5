"""Layer by layer before end to end: every converted layer learns its dense original's outputs on what it really gets.

Layers go in the order of the model. The inputs of a layer are what the student produces, with all layers before it trained
already; the targets are what the teacher's layer puts out for the same rows. Both are run once a layer and kept in memory
(rows x tokens x (in + out features) x 4 bytes), and the layer alone is trained on them by Adam with a cosine step size.
A layer that got no better keeps what it had.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.data.training import Rows, batch_indices
from spmconvert.outputs.losses import relative_square

# rows that a layer is matched on, and tokens a step
ROWS = 64
BATCH_ROWS = 8
BATCH_TOKENS = 1024


def match_layer(
    student: Any, teacher: Any, name: str, rows: Rows, *, steps: int, learning_rate: float, seed: int
) -> tuple[float, float]:
    """Train one converted layer of a student towards its dense original, in place.

    Args:
        student: the converted model; gradients of its other parameters are left alone.
        teacher: the dense model.
        name: the layer, by the same name in both.
        rows: training rows.
        steps: optimizer steps.
        learning_rate: at its peak.
        seed: seed of rows and of batches.

    Returns:
        Squared error relative to the targets' mean square before and after, on the rows that were trained on.
    """
    chosen = batch_indices(len(rows), min(ROWS, len(rows)), 0, seed)
    inputs, targets = _record(student, teacher, name, rows, chosen)
    layer = student.get_submodule(name)
    before = _error(layer, inputs, targets)
    state_before = {key: value.detach().clone() for key, value in layer.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        some = torch.randint(len(inputs), (BATCH_TOKENS,), generator=generator).to(inputs.device)
        loss = relative_square(layer(inputs[some]), targets[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    after = _error(layer, inputs, targets)
    if not after < before:
        layer.load_state_dict(state_before)
        after = before
    return before, after


@torch.no_grad()
def _record(student: Any, teacher: Any, name: str, rows: Rows, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the student feeds the layer, and what the teacher's layer puts out, [tokens, features] each."""
    layer_inputs: list[Tensor] = []
    targets: list[Tensor] = []
    mask: Tensor | None = None

    def keep(into: list[Tensor], part: Callable[[Any, Any], Tensor]) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            state = part(inputs, output)
            real = state[mask] if mask is not None and mask.shape == state.shape[:2] else state
            into.append(real.reshape(-1, state.shape[-1]).float())

        return hook

    handles = [
        student.get_submodule(name).register_forward_hook(keep(layer_inputs, lambda inputs, _: inputs[0])),
        teacher.get_submodule(name).register_forward_hook(keep(targets, lambda _, output: output)),
    ]
    try:
        for part in _batches(chosen):
            for model in (student, teacher):
                batch = rows.batch(part, model, 0)
                mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(layer_inputs), torch.cat(targets).to(layer_inputs[0].device)


def _batches(chosen: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(chosen), BATCH_ROWS):
        yield chosen[first : first + BATCH_ROWS]


@torch.no_grad()
def _error(layer: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    return relative_square(layer(inputs), targets).item()
