"""Block-dense: Monarch with one input chunk, its integers, and the fit that is exact."""

import pytest
import torch

from spmconvert.errors import OptionError
from spmconvert.operator.chunks import CHUNK_TOKENS
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.blockdense import BlockDense
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.module import LeastSquares
from spmconvert.operator.terms.monarch import Monarch
from spmconvert.operator.terms.registry import term_from_json
from tests.operator.terms.test_monarch import error, metric_of, problem


def test_integers():
    term = BlockDense(102, 200, blocks_out=8, rank=3)
    assert term.to_json() == {"kind": "blockdense", "blocks_out": 8, "rank": 3}
    assert term_from_json(102, 200, term.to_json()) == term
    assert term.parameter_count() == Monarch(102, 200, 1, 8, 3).parameter_count() == 3 * (200 + 8 * 102)
    assert sum(parameter.numel() for parameter in term.build().parameters()) == term.parameter_count()
    with pytest.raises(TypeError):
        BlockDense(102, 200, blocks_in=2, blocks_out=8, rank=3)


@pytest.mark.parametrize(
    "numbers", [{"blocks_out": 7}, {"blocks_out": 8, "rank": 0}, {"blocks_out": 8, "rank": 26}], ids=str
)
def test_what_is_refused(numbers):
    with pytest.raises(OptionError, match="of a blockdense term is"):
        BlockDense(102, 200, **numbers)
    with pytest.raises(OptionError, match="it needs"):
        BlockDense.from_json(102, 200, {"kind": "blockdense", "blocks_in": 1, "blocks_out": 8, "rank": 1})


@pytest.mark.parametrize("tokens", [1, 3 * CHUNK_TOKENS + 7])
def test_in_a_layer_with_the_others(tokens):
    torch.manual_seed(0)
    terms = [LowRank(102, 200, 3), BlockDense(102, 200, blocks_out=8, rank=2), Monarch(102, 200, 3, 8, 2)]
    layer = SPMLinear(102, 200, terms=terms, dtype=torch.double)
    assert [name for name, _ in layer.named_parameters()][:4] == [
        "monarch.first", "monarch.second", "blockdense.first", "blockdense.second"
    ]  # fmt: skip
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        x = torch.randn(tokens, 102, dtype=torch.double)
        expected = torch.nn.functional.linear(x, layer.to_dense(), layer.held_bias)
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), expected)


def test_every_row_block_is_the_best_of_its_rank():
    least, module = problem(102, 200), BlockDense(102, 200, blocks_out=8, rank=5).build()
    assert module.term.closed_form
    module.solve_(least)
    for rows, found in zip(least.weight.chunk(8), module.matrix().detach().chunk(8), strict=True):
        sizes = torch.linalg.svdvals((rows @ least.root.t()).double()).square()
        part = LeastSquares(rows, least.root)
        assert error(part, found) == pytest.approx((sizes[5:].sum() / sizes.sum()).item(), rel=1e-3)


def test_better_than_low_rank_where_row_blocks_differ():
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(25, 4) @ torch.randn(4, 102) for _ in range(8)]) + 0.05 * torch.randn(200, 102)
    least = LeastSquares(weight, problem(102, 200).root)
    term = BlockDense(102, 200, blocks_out=8, rank=4)
    low_rank = LowRank(102, 200, term.parameter_count() // 302).build()
    module = term.build()
    module.solve_(least)
    low_rank.solve_(least)
    assert error(least, module.matrix().detach()) < 0.2 * error(least, low_rank.matrix().detach())


def test_a_metric_is_followed():
    weighted, module = problem(102, 200, metric_of(200)), BlockDense(102, 200, blocks_out=8, rank=3).build()
    errors = []
    for least in (problem(102, 200), weighted):
        module.solve_(least)
        errors.append(error(weighted, module.matrix().detach()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("shape", [(384, 384), (576, 1536), (1536, 576)], ids=str)
def test_designs_fit_and_fill_the_budget(shape):
    budget = shape[0] * shape[1] // 4
    found = BlockDense.designs(*shape, budget)
    assert 2 <= len(found) <= 3
    for term in found:
        assert budget - term.parameter_count() // term.rank < term.parameter_count() <= budget
    assert BlockDense.designs(*shape, 100) == []
