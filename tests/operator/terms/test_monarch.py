"""Monarch: against a dense matrix built block by block, in place and in chunks, and its fit by coordinate descent."""

import copy
import itertools

import pytest
import torch

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.errors import OptionError
from spmconvert.operator.blockwise import descend_, fit_blocks, truncated_grid
from spmconvert.operator.chunks import CHUNK_TOKENS
from spmconvert.operator.factors import covariance_root
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.module import LeastSquares
from spmconvert.operator.terms.monarch import FEW_TOKENS, Monarch
from spmconvert.operator.terms.registry import term_from_json

# in, out, blocks_in, blocks_out, rank
GRIDS = [(102, 200, 3, 8, 2), (102, 200, 6, 4, 5), (200, 102, 8, 3, 1), (96, 96, 1, 6, 3), (96, 90, 6, 1, 4)]
TOKENS = [1, FEW_TOKENS, FEW_TOKENS + 1, CHUNK_TOKENS + 1]


def build(grid, dtype=torch.double, seed=0):
    torch.manual_seed(seed)
    return Monarch(*grid).build(dtype=dtype)


def dense(module):
    """Block by block, from the definition."""
    term = module.term
    matrix = torch.zeros(term.out_features, term.in_features, dtype=module.first.dtype)
    rows, columns = term.out_features // term.blocks_out, term.in_features // term.blocks_in
    for j in range(term.blocks_out):
        for i in range(term.blocks_in):
            block = torch.zeros(rows, columns, dtype=matrix.dtype)
            for a in range(term.rank):
                outward = module.second[j, :, i * term.rank + a]
                block += torch.outer(outward, module.first[i, a * term.blocks_out + j])
            matrix[j * rows : (j + 1) * rows, i * columns : (i + 1) * columns] = block
    return matrix


def problem(in_features, out_features, metric=None, seed=0):
    """Correlated inputs and a weight whose singular values fall."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, in_features, generator=generator) @ torch.randn(in_features, in_features, generator=generator)
    weight = torch.randn(out_features, 12, generator=generator) @ torch.randn(12, in_features, generator=generator)
    weight += torch.randn(out_features, in_features, generator=generator)
    return LeastSquares(weight, covariance_root(x.t() @ x / len(x)), metric)


def metric_of(size, directions=3, ratio=300.0):
    vectors = torch.linalg.qr(torch.randn(size, directions, generator=torch.Generator().manual_seed(5)))[0]
    return OutputMetric.of(torch.eye(size) + ratio * vectors @ vectors.t())


def error(found, matrix):
    """Share of the weighted energy that is left."""

    def energy(weight):
        outputs = found.root @ weight.t()
        return (outputs if found.metric is None else found.metric.root(outputs)).square().sum().item()

    return energy(found.weight - matrix) / energy(found.weight)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_form_is_the_dense_matrix(grid, tokens):
    module = build(grid)
    x = torch.randn(tokens, grid[0], dtype=torch.double)
    expected = x @ dense(module).t()
    torch.testing.assert_close(module.matrix(), dense(module))
    torch.testing.assert_close(module.reference(x), expected)
    y = module(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@torch.no_grad()
def test_in_place(grid, tokens):
    module = build(grid)
    x, bias = torch.randn(tokens, grid[0], dtype=torch.double), torch.randn(grid[1], dtype=torch.double)
    expected = module.reference(x)
    y = torch.full((tokens, grid[1]), torch.nan, dtype=torch.double)
    module.write_(x, None, y)
    torch.testing.assert_close(y, expected)
    module.write_(x, bias, y)
    torch.testing.assert_close(y, expected + bias)
    module.add_(x, y)
    torch.testing.assert_close(y, 2 * expected + bias)


def test_inputs_of_any_strides():
    module = build(GRIDS[0])
    wide = torch.randn(9, 2 * 102, dtype=torch.double)
    for x in (wide[:, ::2], wide[:, 102:], wide.view(2 * 9, 102).t().contiguous().t()):
        torch.testing.assert_close(module(x), module.reference(x))
        with torch.no_grad():
            y = x.new_empty(len(x), 200)
            module.write_(x, None, y)
        torch.testing.assert_close(y, module.reference(x))


@pytest.mark.parametrize("others", [(), (LowRank(102, 200, 3),)], ids=["alone", "beside low rank"])
@pytest.mark.parametrize("tokens", [0, 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS + 7])
def test_in_a_layer(others, tokens):
    torch.manual_seed(0)
    layer = SPMLinear(102, 200, terms=[Monarch(*GRIDS[0]), *others], dtype=torch.double)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(tokens, 102, dtype=torch.double)
    expected = torch.nn.functional.linear(x, layer.to_dense(), layer.held_bias)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("grid", [(12, 10, 3, 2, 2), (12, 10, 1, 5, 2), (8, 9, 4, 1, 1)], ids=str)
def test_gradients(grid):
    module = build(grid)
    x = torch.randn(4, grid[0], dtype=torch.double, requires_grad=True)

    def call(x, first, second):
        return torch.func.functional_call(module, {"first": first, "second": second}, (x,))

    assert torch.autograd.gradcheck(call, (x, module.first, module.second))
    assert torch.autograd.gradgradcheck(call, (x, module.first, module.second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
@torch.no_grad()
def test_half_precision(dtype, tokens):
    module = build(GRIDS[0], dtype)
    x = torch.randn(tokens, 102).to(dtype)
    exact = copy.deepcopy(module).double().reference(x.double())

    def off(y):
        return ((y.double() - exact).norm() / exact.norm()).item()

    written, added = torch.empty(2, tokens, 200, dtype=dtype)
    module.write_(x, None, written)
    module.add_(x, added.zero_())
    for y in (module(x), written, added):
        assert y.dtype == dtype
        assert off(y) <= 2 * off(module.reference(x))
    # parameters may be wider than the activations
    assert off(copy.deepcopy(module).float()(x)) <= 2 * off(module.reference(x))


@pytest.mark.parametrize("training", [True, False])
def test_compile_without_graph_breaks(training):
    module = build(GRIDS[1], torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(CHUNK_TOKENS + 1, 102)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), module(x))
    if training:
        found = torch.autograd.grad(compiled(x).square().sum(), list(module.parameters()))
        torch.testing.assert_close(found, torch.autograd.grad(module(x).square().sum(), list(module.parameters())))


def test_transforms():
    module = build(GRIDS[0])
    x = torch.randn(3, 7, 102, dtype=torch.double)
    torch.testing.assert_close(torch.vmap(module)(x), torch.stack([module(rows) for rows in x]))
    torch.testing.assert_close(torch.func.jvp(module, (x[0],), (x[1],))[1], module(x[1]))


def test_meta_device_and_copies():
    module = Monarch(*GRIDS[0]).build(device="meta")
    assert module(torch.empty(3, 102, device="meta")).shape == (3, 200)
    module = build(GRIDS[0])
    again = copy.deepcopy(module)
    with torch.no_grad():
        module.first.zero_()
    assert not again.matrix().eq(0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_integers(grid):
    module, term = build(grid), Monarch(*grid)
    assert sum(parameter.numel() for parameter in module.parameters()) == term.parameter_count()
    assert term.flops_per_token() == 2 * term.parameter_count()
    assert term_from_json(*grid[:2], term.to_json()) == term
    # a two-dimensional tensor of that name could pass for a dense weight
    assert all(parameter.ndim == 3 for parameter in module.parameters())
    assert module.scale_parameter() is module.second


def test_fresh_terms_keep_the_variance():
    for grid in ((256, 256, 8, 8, 2), (256, 1024, 4, 16, 8), (1024, 256, 16, 1, 2)):
        assert 0.7 < build(grid, torch.float32)(torch.randn(500, grid[0])).std() < 1.4


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ((102, 200, 4, 8, 1), "blocks_in of a monarch term is 4; it must divide 102"),
        ((102, 200, 3, 7, 1), "blocks_out of a monarch term is 7; it must divide 200"),
        ((102, 200, 3, 8, 0), "rank of a monarch term is 0"),
        ((102, 200, 3, 8, 26), "rank of a monarch term is 26; .* 25 x 34"),
        ((102, 200, 0, 8, 1), "blocks_in of a monarch term is 0"),
        ((102, 200, 3, True, 1), "blocks_out of a monarch term is True"),
    ],
)
def test_what_is_refused(numbers, word):
    with pytest.raises(OptionError, match=word):
        Monarch(*numbers)


@pytest.mark.parametrize("shape", [(384, 384), (576, 1536), (1536, 576), (2048, 8192), (102, 200)], ids=str)
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_designs_fit_and_fill_the_budget(shape, keep):
    budget = int(keep * shape[0] * shape[1])
    found = Monarch.designs(*shape, budget)
    assert 1 <= len(found) <= 2
    assert len({(term.blocks_in, term.blocks_out) for term in found}) == len(found)
    for term in found:
        assert term.parameter_count() <= budget
        step = term.parameter_count() // term.rank
        assert term.parameter_count() + step > budget
        assert term.columns >= 16
        assert term.rows >= 16


def test_no_designs_where_nothing_fits():
    assert Monarch.designs(384, 384, 100) == []
    # no divisors
    assert Monarch.designs(389, 397, 389 * 397 // 2) == []


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("weighs", [False, True], ids=["plain", "metric"])
def test_a_matrix_of_the_form_is_recovered(grid, weighs):
    planted, module = build(grid, torch.float32).matrix().detach(), build(grid, torch.float32, seed=1)
    module.start_(LeastSquares(planted, torch.eye(grid[0]), metric_of(grid[1]) if weighs else None), seed=0)
    # a metric is undone in float32: its condition number is 300
    assert (module.matrix() - planted).norm() < (1e-4 if weighs else 1e-6) * planted.norm()


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[2], GRIDS[4]], ids=str)
def test_no_sweep_is_worse_than_the_one_before(grid):
    least = problem(*grid[:2])
    blocks = truncated_grid(least.weight, least.root, *grid[2:])
    total = (least.root @ least.weight.t()).square().sum().item()
    errors = descend_(blocks, least.weight, least.root)
    assert len(errors) > 2
    assert all(later <= earlier + 1e-6 * total for earlier, later in itertools.pairwise(errors))
    # kept by sums of what each step gained
    assert errors[-1] / total == pytest.approx(error(least, blocks.matrix()), rel=1e-3)
    assert errors[-1] < 0.95 * errors[0]


def test_no_single_block_can_be_improved():
    least = problem(96, 80)
    blocks = fit_blocks(least, 4, 5, 3)
    for _ in range(8):
        descend_(blocks, least.weight, least.root)
    found = error(least, blocks.matrix())
    sigma = (least.root.t() @ least.root).double()
    for i in (0, 3):
        columns = slice(i * 24, (i + 1) * 24)
        others = blocks.matrix().double()
        others[:, columns] = 0
        left_over = (least.weight.double() - others) @ sigma[:, columns]
        values, vectors = torch.linalg.eigh(sigma[columns, columns])
        inverse = (vectors / values.sqrt()) @ vectors.t()
        left, size, right = torch.linalg.svd((left_over @ inverse).view(5, 16, 24), full_matrices=False)
        best = (left[..., :3] * size[:, None, :3]) @ right[:, :3]
        others[:, columns] = best.flatten(0, 1) @ inverse
        assert error(least, others.float()) > found * (1 - 2e-3)


def test_start_is_the_same_for_every_seed_and_balanced():
    least, modules = problem(102, 200), [build(GRIDS[0], torch.float32, seed) for seed in (0, 1)]
    for seed, module in enumerate(modules):
        module.start_(least, seed)
    assert modules[0].matrix().equal(modules[1].matrix())
    blocks = modules[0].blocks()
    inward, outward = blocks.first.norm(dim=3), blocks.second.norm(dim=1).permute(1, 2, 0)
    torch.testing.assert_close(inward, outward)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_metric_is_followed(grid):
    plain = problem(*grid[:2])
    weighted = problem(*grid[:2], metric_of(grid[1]))
    without, with_it = (fit_blocks(least, *grid[2:]).matrix() for least in (plain, weighted))
    assert error(weighted, with_it) < 0.9 * error(weighted, without)
    assert error(weighted, with_it) < 1


def shared_direction():
    """All inputs are nearly the same number, which no row of the weight reads."""
    root = covariance_root(torch.ones(102, 102) + 1e-3 * torch.eye(102))
    weight = problem(102, 200).weight
    return LeastSquares(weight - weight.mean(1, keepdim=True), root)


def test_systems_are_solved_one_by_one(monkeypatch):
    """A batch of them hangs, or is solved wrongly, in MKL's LU once ``torch.set_num_threads`` was called."""
    solve = torch.linalg.solve

    def single(matrix, *arguments, **options):
        assert matrix.dim() == 2
        return solve(matrix, *arguments, **options)

    monkeypatch.setattr(torch.linalg, "solve", single)
    generator = torch.Generator().manual_seed(0)
    problem = LeastSquares(torch.randn(24, 32, generator=generator), torch.randn(64, 32, generator=generator))
    assert fit_blocks(problem, 4, 3, 2).matrix().isfinite().all()


def test_correlated_inputs_do_not_hold_it_up():
    least = shared_direction()
    blocks = truncated_grid(least.weight, least.root, 6, 8, 1)
    before = error(least, blocks.matrix())
    # sweeps alone take off less than a thousandth
    descend_(blocks, least.weight, least.root)
    assert error(least, blocks.matrix()) < 0.9 * before


@pytest.mark.parametrize("weighs", [False, True], ids=["plain", "metric"])
def test_never_worse_than_nothing(weighs):
    # rows read the shared direction six times, and it cancels; truncation keeps it in three chunks and drops it in three
    shared, own = torch.ones(17), torch.linspace(-1, 1, 17)
    own *= (1.1 * 17**2 / 1e-3) ** 0.5 / own.norm()
    unit = torch.eye(200)
    dropped = torch.outer(unit[0], shared) + torch.outer(unit[1], own)
    weight = torch.cat([*[dropped] * 3, *[-torch.outer(unit[0], shared)] * 3], dim=1)
    least = LeastSquares(weight, shared_direction().root, metric_of(200) if weighs else None)
    assert error(least, truncated_grid(weight, least.root, 6, 8, 1).matrix()) > 1.5
    assert error(least, fit_blocks(least, 6, 8, 1).matrix()) <= 1


@pytest.mark.parametrize("metric", [None, metric_of(200)], ids=["plain", "metric"])
def test_nothing_to_fit(metric):
    for weight, root in ((torch.zeros(200, 102), torch.eye(102)), (torch.ones(200, 102), torch.zeros(102, 102))):
        module = build(GRIDS[0], torch.float32)
        module.start_(LeastSquares(weight, root, metric), seed=0)
        assert module.matrix().isfinite().all()
