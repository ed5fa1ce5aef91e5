"""SPMLinear: the layer that takes the place of nn.Linear, a bias and a sum of terms.

Every term is a child named after its kind. All of them write into one output: on a CPU without gradients a chunk of tokens
at a time, while that is in cache; otherwise one after the other, low rank in place. The bias belongs to low rank's ``up``
where there is one, so that low rank alone is two ordinary layers, and to this module otherwise.

``weight`` is a mark that holds no parameter: it is three-dimensional, so a program that does not know this layer fails on
its shape instead of loading something random, and model code that asks for ``module.weight.dtype`` keeps working.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spmconvert.operator.chunks import CHUNK_TOKENS
from spmconvert.operator.design import Design, staged_design
from spmconvert.operator.dispatch import Backend
from spmconvert.operator.kept import Keeper, can_be_kept
from spmconvert.operator.offloaded import fetched, may_be_offloaded
from spmconvert.operator.reference import is_recorded, is_transformed
from spmconvert.operator.terms.lowrank import LowRank, LowRankModule
from spmconvert.operator.terms.module import TermModule
from spmconvert.operator.terms.term import Term

MARK_SHAPE = (1, 1, 1)


class SPMLinear(Keeper):
    """A linear layer whose matrix is a sum of terms.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether the layer has a bias.
        terms: what the matrix is the sum of; None for the stages and the rank that ``numbers`` give.
        backend: who computes SPM stages: ``auto``, ``reference``, ``merged`` or ``triton``.
        device: device of the parameters.
        dtype: dtype of the parameters. It may be wider than that of the inputs, in which the output comes back.
        **numbers: ``stages``, ``variant``, ``block`` and ``rank``, as ``staged_design`` takes them.

    Shape:
        input [..., in_features] -> output [..., out_features]

    Attributes:
        design: the terms in integers.
        weight: the mark, [1, 1, 1]; no parameter.
        bias: [out_features], or None; None too where ``lowrank.up`` holds it, see ``held_bias``.

    Raises:
        OptionError: when the numbers do not describe a layer, or are given beside terms.
    """

    weight: Tensor
    # whether products are made in int8, which every term does by itself
    multiplies_int8 = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        terms: Sequence[Term] | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **numbers: Any,
    ) -> None:
        super().__init__()
        if terms is not None and numbers:
            raise TypeError(f"terms and {', '.join(numbers)} are both given")
        if terms is None:
            design = staged_design(in_features, out_features, **numbers)
        else:
            design = Design(in_features, out_features, tuple(terms))
        self.design = design
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(MARK_SHAPE, device=device, dtype=dtype))
        for term in design.terms:
            if isinstance(term, LowRank):
                self.add_module(term.kind, LowRankModule(term, bias=bias, device=device, dtype=dtype))
            else:
                self.add_module(term.kind, term.build(backend=backend, device=device, dtype=dtype))
        self.bias = None
        if bias and design.bias_name == "bias":
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        # read at every call
        self._only_low_rank = design.only_low_rank
        self._runs_dense = design.runs_dense
        self._kinds = tuple(term.kind for term in design.terms)
        if len(self._kinds) > 1 and self.low_rank is not None:
            with torch.no_grad():
                self.low_rank.up.weight.zero_()

    @property
    def term_modules(self) -> list[TermModule]:
        """The terms, in the order of the design."""
        return [self._modules[kind] for kind in self._kinds]  # type: ignore[misc]

    @property
    def low_rank(self) -> LowRankModule | None:
        """The low-rank term, or None."""
        return self._modules.get("lowrank")  # type: ignore[return-value]

    @property
    def held_bias(self) -> nn.Parameter | None:
        """The layer's bias, wherever it is."""
        low_rank = self.low_rank
        return self.bias if low_rank is None else low_rank.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., in_features] -> [..., out_features], in the dtype of x or of autocast."""
        if self._only_low_rank and x.dtype == self._buffers["weight"].dtype:  # type: ignore[union-attr]
            return self._modules["lowrank"].called(x)  # type: ignore[union-attr, operator]
        device = x.device.type
        # other devices than these two may not know of autocast
        if not (x.is_cpu or torch.amp.is_autocast_available(device)) or not torch.is_autocast_enabled(device):
            return self._run(x)
        if self._only_low_rank:
            return self._modules["lowrank"].called(x)  # type: ignore[union-attr, operator]
        if x.dtype == torch.float64:
            return self._run(x)
        with torch.autocast(device, enabled=False):
            return self._run(x.to(torch.get_autocast_dtype(device)))

    def _run(self, x: Tensor) -> Tensor:
        if not may_be_offloaded(self):
            return self._product(x)
        with fetched(self):
            y = self._product(x)
        self.drop_cache_()
        return y

    def _product(self, x: Tensor) -> Tensor:
        if self._runs_dense and not self.multiplies_int8 and (sources := self._sources_to_keep(x)) is not None:
            return linear(x, self._kept_matrix(x.dtype, sources), self._bias_in(x.dtype))
        tokens = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        y = self._multiplied(tokens)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _multiplied(self, tokens: Tensor) -> Tensor:
        return self._summed(tokens) if self.multiplies_int8 or not self._may_chunk(tokens) else self._in_chunks(tokens)

    def _sources_to_keep(self, x: Tensor) -> list[Tensor] | None:
        """What the whole matrix is made of, where it may be kept; None where it may not.

        It may where nothing in it is trained by this call, and a change would be seen.
        """
        low_rank = self.low_rank
        if not x.is_cpu or (low_rank is not None and not low_rank.is_plain) or is_recorded():
            return None
        parameters, buffers = self._matrix_tensors()
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return None
        return [*parameters, *buffers] if can_be_kept(self, parameters, buffers) else None

    def _kept_matrix(self, dtype: torch.dtype, sources: list[Tensor]) -> Tensor:
        return self.keep(dtype, SPMLinear.to_dense, sources, lambda: [self.to_dense().to(dtype)])[0]

    def _matrix_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and buffers of the terms, but for the bias. A walk over names takes as long as a small product."""
        parameters: list[Tensor] = []
        buffers: list[Tensor] = []
        modules: list[nn.Module] = [*self.term_modules]
        for module in modules:
            parameters += [held for held in module._parameters.values() if held is not None]
            buffers += [held for held in module._buffers.values() if held is not None]
            modules += [inner for inner in module._modules.values() if inner is not None]
        bias = self.held_bias
        return [parameter for parameter in parameters if parameter is not bias], buffers

    def _may_chunk(self, x: Tensor) -> bool:
        low_rank = self.low_rank
        return (
            not torch.is_grad_enabled()
            and x.is_cpu
            and not is_recorded()
            and not is_transformed()
            and (low_rank is None or low_rank.is_plain)
        )

    def _in_chunks(self, x: Tensor) -> Tensor:
        first, *others = self.term_modules
        bias = self._bias_in(x.dtype)
        y = x.new_empty(x.shape[0], self.out_features)
        if x.shape[0] <= CHUNK_TOKENS:
            first.write_(x, bias, y)
            for term in others:
                term.add_(x, y)
            return y
        for rows, target in zip(x.split(CHUNK_TOKENS), y.split(CHUNK_TOKENS), strict=True):
            first.write_(rows, bias, target)
            for term in others:
                term.add_(rows, target)
        return y

    def _bias_in(self, dtype: torch.dtype) -> Tensor | None:
        bias = self.held_bias
        return bias if bias is None or bias.dtype == dtype else bias.to(dtype)

    def _summed(self, x: Tensor) -> Tensor:
        low_rank = self.low_rank
        plain = low_rank is None or low_rank.is_plain
        bias = self._bias_in(x.dtype) if plain else None
        if self._only_low_rank:
            assert low_rank is not None
            return low_rank.biased(x, bias) if plain else low_rank(x)
        first, *others = (term for term in self.term_modules if term is not low_rank)
        y = first.biased(x, bias)
        for term in others:
            y = y + term(x)
        if low_rank is not None:
            y = low_rank.added_to(x, y) if plain else y + low_rank(x)
        return y

    def to_dense(self) -> Tensor:
        """The matrix the layer multiplies by, [out_features, in_features], differentiable."""
        first, *others = (term.matrix() for term in self.term_modules)
        for matrix in others:
            first = first + matrix
        return first

    def extra_repr(self) -> str:
        """Shape, terms, and the share of the dense parameters that is left."""
        kept = self.design.parameter_count(bias=False) / (self.in_features * self.out_features)
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.held_bias is not None}"
        return f"{shape}, terms={self.design.describe()}, kept={kept:.1%}"
