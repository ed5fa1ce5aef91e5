"""Train a block whose layers are replaced until it does, on what the converted model feeds it, what the dense block did.

Fits look at one layer at a time; what they leave is made up for best right behind it, by everything in the block that is
cheap to change: its new layers, its norms and its biases. Matching blocks this way is what most of the published gains at
equal parameters come from (3BASiL's transformer matching, AA-SVD).

Errors are compared as the rest of the model reads them, behind the norm that follows: in raw hidden states a few huge
features are nearly all of the error. A block whose error on rows it was not trained on did not become smaller stays as it
was fitted. Products are in bfloat16 on a CPU that multiplies it natively: a step takes a little more than half as long, and
SmolLM2-135M ends within .0007 nats of float32; errors are measured in float32. What it gives up: layers outside of one
list of blocks, and experts (see ``streams``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spmconvert.fit.streams import Streams, layer_blocks, no_chain
from spmconvert.model.chain import chain_through
from spmconvert.model.swap import replace_module
from spmconvert.system.devices import multiplies_bfloat16

# where nothing is said about it
REFINEMENT_EPOCHS = 4
RATE, BETAS = 2e-3, (0.9, 0.95)
# share of the steps in which the rate rises
WARM_UP = 0.1
# one batch of so many checks what the others train
CHECKED = 8


@dataclass(frozen=True)
class Refinement:
    """What training a block changed, in relative squared errors of what the next block reads, on rows that only check.

    Attributes:
        before: the error of the block as it was fitted.
        after: as it is now; the same where it was put back.
    """

    before: float
    after: float


def refine_(streams: Streams, trained: list[nn.Parameter], *, epochs: int, seed: int) -> Refinement:
    """Train parameters of the block at work, in place.

    Args:
        streams: that have come to the block, with all of its layers converted.
        trained: parameters of ``streams.block``.
        epochs: passes over the rows that train.
        seed: of the order of the batches.

    Returns:
        What it changed.
    """
    wanted = _Wanted(streams)
    checking = range(0, len(streams.masks), CHECKED)
    training = [batch for batch in range(len(streams.masks)) if batch not in checking] or list(checking)
    before = wanted.error(checking)
    fitted = [parameter.detach().clone() for parameter in trained]
    _train_(wanted, trained, training, epochs, seed)
    after = wanted.error(checking)
    if after < before:
        return Refinement(before, after)
    with torch.no_grad():
        for parameter, value in zip(trained, fitted, strict=True):
            parameter.copy_(value)
    return Refinement(before, before)


def refine_model_(
    model: Any, dense: Any, names: Sequence[str], batches: Sequence[dict[str, Any]], *, epochs: int, seed: int
) -> None:
    """Refine all blocks of a model whose layers are replaced, one after the other, in place; nothing is rounded or stored.

    Args:
        model: that shares every tensor that it does not change with the dense one; its blocks are replaced.
        dense: the dense model, which stays as it is.
        names: of the replaced layers.
        batches: keyword arguments of the models.
        epochs: passes over them.
        seed: of the order of the batches, the same in every block.

    Raises:
        OptionError: when the layers are on no path through a chain of blocks.
    """
    container, places = layer_blocks(dense, names)
    chain = chain_through(dense, container, batches[0])
    if chain is None:
        raise no_chain(container)
    streams = Streams(chain, batches, names, paired=())
    for index in sorted(set(places.values())):
        while streams.index < index:
            streams.advance()
        here = [name for name in names if places[name] == index]
        for name in here:
            streams.convert(name, model.get_submodule(name).float())
        layers = [parameter for name in here for parameter in model.get_submodule(name).parameters()]
        known = set(map(id, layers))
        vectors = [own for own in streams.block.parameters() if own.dim() == 1 and id(own) not in known]
        refine_(streams, layers + vectors, epochs=epochs, seed=seed)
        replace_module(model, f"{container}.{index}", streams.block)
        streams.advance()
    model.to(dense.dtype)


def _train_(wanted: "_Wanted", trained: list[nn.Parameter], batches: list[int], epochs: int, seed: int) -> None:
    steps = epochs * len(batches)
    optimizer = torch.optim.Adam(trained, lr=RATE, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    fast = trained[0].is_cpu and multiplies_bfloat16("cpu")
    for parameter in trained:
        parameter.requires_grad_(True)
    for _ in range(epochs):
        for position in torch.randperm(len(batches), generator=generator).tolist():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                loss = wanted.loss(batches[position])
            loss.backward()
            optimizer.step()
            schedule.step()
    for parameter in trained:
        parameter.requires_grad_(False)


def _share_of_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class _Wanted:
    """What the dense block puts out, as the next one reads it."""

    def __init__(self, streams: Streams) -> None:
        self._streams, self._norm = streams, streams.reading_norm()
        with torch.no_grad():
            self._targets = [self._read(after, batch) for batch, after in enumerate(streams.dense_after())]
            energy = sum(target.square().sum() for target in self._targets)
            self._mean_energy = energy / sum(len(target) for target in self._targets)

    def _read(self, states: Tensor, batch: int) -> Tensor:
        """Hidden states behind the norm, without padding: [tokens, features]."""
        read = states if self._norm is None else self._norm(states)
        mask = self._streams.masks[batch]
        return read.flatten(0, -2) if mask is None else read[mask.bool()]

    def loss(self, batch: int) -> Tensor:
        """Squared error of a batch, relative to what all batches have of what is wanted."""
        missed = self._read(self._streams.run(batch), batch) - self._targets[batch]
        loss: Tensor = missed.square().sum(-1).mean() / self._mean_energy
        return loss

    @torch.no_grad()
    def error(self, batches: range) -> float:
        """Mean loss of batches, each by its tokens."""
        sizes = [len(self._targets[batch]) for batch in batches]
        total = sum(self.loss(batch).item() * size for batch, size in zip(batches, sizes, strict=True))
        return total / sum(sizes)
