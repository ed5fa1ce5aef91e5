"""One free term of several layers: their unknowns side by side, and what the terms make of rows.

Terms are computed by ``torch.func.vmap`` over the ordinary ``forward`` of the largest of them, which for SPM stages is the
merged form as plain tensor operations; a Triton kernel cannot be mapped over, and layers that ask for one are refused.
Smaller terms are padded with zeros that change neither outputs nor gradients, and that no solver moves away from zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from spmconvert.errors import BackendError
from spmconvert.operator.terms.module import TermModule


@dataclass(frozen=True)
class StackedTerm:
    """A term of every member.

    Attributes:
        modules: theirs.
        largest: the module whose sizes the unknowns have.
        shapes: of its unknowns by name, in order.
        held: what else the modules hold, by name, [members, ...].
    """

    modules: Sequence[TermModule]
    largest: TermModule
    shapes: dict[str, torch.Size]
    held: dict[str, Tensor]

    @classmethod
    def of(cls, modules: Sequence[TermModule]) -> "StackedTerm":
        """Modules of terms with the same ``batch_form``.

        Raises:
            BackendError: when one of them asks for a backend that cannot be mapped over.
        """
        if any(getattr(part, "backend", "auto") == "triton" for module in modules for part in module.modules()):
            raise BackendError(
                "a batch of layers is fitted through the merged form, and one of them asks for triton; use backend auto, "
                "or fit it alone"
            )
        largest = max(modules, key=lambda module: module.term.parameter_count())
        shapes = {name: tensor.shape for name, tensor in _unknowns(largest).items()}
        holders = [dict((*module.named_parameters(), *module.named_buffers())) for module in modules]
        held = {name: torch.stack([own[name].detach() for own in holders]) for name in holders[0] if name not in shapes}
        return cls(modules, largest, shapes, held)

    @property
    def size(self) -> int:
        """Unknowns of a member."""
        return sum(shape.numel() for shape in self.shapes.values())

    def start(self) -> Tensor:
        """Unknowns of all members as they are, [members, unknowns]."""
        padded = [module.padded(_unknowns(module), self.largest.term) for module in self.modules]
        return torch.stack([torch.cat([own[name].flatten() for name in self.shapes]) for own in padded])

    def step_sizes(self) -> Tensor:
        """What steps are relative to, of the same shape."""
        sizes = self.start().new_tensor([[size for _, size in module.unknowns()] for module in self.modules])
        numbers = [shape.numel() for shape in self.shapes.values()]
        return sizes.repeat_interleave(torch.tensor(numbers, device=sizes.device), dim=1)

    def own(self, member: int, values: Tensor) -> list[Tensor]:
        """A member's unknowns [unknowns] in the shapes and the order of its own module."""
        module = self.modules[member]
        found = module.cut({name: value[0] for name, value in self._named(values[None]).items()}, self.largest.term)
        return [found[name].clone() for name in self.shapes]

    def outputs(self, values: Tensor, rows: Tensor) -> Tensor:
        """What every member's term with unknowns [members, unknowns] makes of rows [members, rows, in_features]."""

        def one(parameters: dict[str, Tensor], held: dict[str, Tensor], rows: Tensor) -> Tensor:
            y: Tensor = functional_call(self.largest, {**parameters, **held}, (rows,))
            return y

        y: Tensor = vmap(one)(self._named(values), self.held, rows)
        return y

    def _named(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def _unknowns(module: TermModule) -> dict[str, Tensor]:
    """Unknowns by name, in the order in which the module gives them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)]: parameter.detach() for parameter, _ in module.unknowns()}
