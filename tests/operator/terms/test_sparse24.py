"""2:4 sparsity: its product, its packed form, what it keeps between calls, its fit, and its wrapped form."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.nn.utils import parametrize
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.errors import OptionError
from spmconvert.operator.factors import covariance_root
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.pruning import choose, pruned, refit
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.module import LeastSquares
from spmconvert.operator.terms.registry import term_from_json
from spmconvert.operator.terms.sparse24 import Sparse24, pack, takes_semi_structured, unpack

SHAPES = [(1, 3), (5, 7), (7, 4), (8, 6), (102, 33)]
FORMS = {"bare": {}, "wrapped": {"wrap": True, "wrap_block": 4, "wrap_stages": 3}}


def built(shape=(102, 33), form="bare", dtype=torch.float32):
    """A term whose wrappers do something."""
    torch.manual_seed(0)
    module = Sparse24(*shape, **FORMS[form]).build(dtype=dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter is not module.values:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def explicit(module):
    """The core, number by number from what is stored."""
    out_features, in_features = module.term.out_features, module.term.in_features
    matrix = torch.zeros(out_features, in_features, dtype=module.values.dtype)
    for row, index in itertools.product(range(out_features), range(module.values.shape[1])):
        group, second = divmod(index, 2)
        bits = int(module.positions[row, group // 2]) >> (4 * (group % 2) + 2 * second)
        column = 4 * group + bits % 4
        if column < in_features:
            matrix[row, column] = module.values[row, index].item()
    return matrix


def dense(module):
    if not module.term.wrap:
        return explicit(module)
    identities = [
        torch.eye(size, dtype=module.values.dtype) for size in (module.term.in_features, module.term.out_features)
    ]
    before, behind = (side.reference(one).t() for side, one in zip((module.before, module.behind), identities, strict=True))
    return behind @ explicit(module) @ before


def kept_matrix(module):
    with torch.no_grad():
        module(torch.randn(2, module.term.in_features))
    return module._cache.blocks[0]


def assert_up_to_date(module):
    x = torch.randn(3, module.term.in_features)
    with torch.no_grad():
        expected = x @ dense(module).t()
        # sums round by the size of what they add, however small they are themselves
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_is_the_dense_matrix(shape, form):
    module = built(shape, form, torch.double)
    x, bias = torch.randn(6, shape[0], dtype=torch.double), torch.randn(shape[1], dtype=torch.double)
    expected = x @ dense(module).t()
    torch.testing.assert_close(module.reference(x), expected)
    torch.testing.assert_close(module.matrix(), dense(module))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(module(x), expected)
            torch.testing.assert_close(module.biased(x, bias), expected + bias)
            strided = x.repeat_interleave(2, dim=1)[:, ::2]
            torch.testing.assert_close(module(strided), expected)
    with torch.no_grad():
        y = torch.full_like(expected, torch.nan)
        for given in (None, bias):
            module.write_(strided, given, y)
            torch.testing.assert_close(y, expected if given is None else expected + bias)
        module.add_(strided, y)
        torch.testing.assert_close(y, 2 * expected + bias)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_gradients(shape, form):
    module = built(shape, form, torch.double)
    x = torch.randn(3, shape[0], dtype=torch.double, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def call(x, *tensors):
        return torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *module.parameters()))
    expected = torch.autograd.grad(module.reference(x).square().sum(), [x, *module.parameters()])
    found = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    torch.testing.assert_close(found, expected)


def test_gradient_of_the_input_of_a_frozen_term():
    module = built().requires_grad_(False)
    x = torch.randn(3, 102, requires_grad=True)
    (found,) = torch.autograd.grad(module(x).sum(), x)
    assert module._cache is not None
    torch.testing.assert_close(found, explicit(module).sum(0).expand(3, -1))


def test_inputs_that_do_not_exist_have_no_gradient():
    module = built((5, 7))
    module(torch.randn(9, 5)).square().sum().backward()
    assert (module.values[:, 3] == 0).all()
    assert (module.values.grad[:, 3] == 0).all()
    assert (module.values.grad[:, :3] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form, dtype):
    module = built(form=form, dtype=dtype)
    x = torch.randn(50, 102).to(dtype)
    exact = copy.deepcopy(module).double().reference(x.double())
    with torch.no_grad():
        own = (module.reference(x).double() - exact).norm()
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y = module(x)
            assert y.dtype == dtype
            assert (y.double() - exact).norm() <= 2 * own
    # parameters may be wider than the inputs
    wide = built(form=form)
    assert wide(x).dtype == wide.reference(x).dtype == dtype


@pytest.mark.parametrize("groups", [1, 2, 5, 26])
def test_packing_and_back(groups):
    places = torch.randint(4, (7, groups, 2))
    packed = pack(places)
    assert packed.dtype == torch.uint8
    assert packed.shape == (7, -(-groups // 2))
    assert torch.equal(unpack(packed, groups), places)


def assert_two_of_four(module):
    places = unpack(module.positions, module.term.groups)
    assert (places[..., 0] < places[..., 1]).all()
    held = torch.nn.functional.pad(module.core(), (0, -module.term.in_features % 4)).unflatten(1, (-1, 4)) != 0
    whole, rest = divmod(module.term.in_features, 4)
    assert (held.sum(-1)[:, :whole] == 2).all()
    assert not rest or (held.sum(-1)[:, -1] == min(2, rest)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exactly_two_of_four(shape):
    module = built(shape)
    assert_two_of_four(module)
    module.solve_(problem(*shape))
    assert_two_of_four(module)
    module.reset_parameters()
    assert_two_of_four(module)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers(shape, form):
    module = built(shape, form)
    term = module.term
    assert sum(parameter.numel() for parameter in module.parameters()) == term.parameter_count()
    assert [name for name, _ in module.named_buffers()] == ["positions"]
    assert module.positions.nbytes == term.index_bytes()
    assert list(module.state_dict())[:2] == ["values", "positions"]
    assert term_from_json(*shape, term.to_json()) == term
    assert term.describe() == ("2:4 wrapped, block 4" if term.wrap else "2:4")
    assert term.flops_per_token() == 2 * shape[0] * shape[1]


def test_sizes_of_an_ordinary_layer():
    term = Sparse24(1536, 576)
    assert term.parameter_count() == 1536 * 576 // 2
    assert term.index_bytes() == 1536 * 576 // 8
    assert Sparse24.designs(1536, 576, 1536 * 288) == [term]
    assert Sparse24.designs(1536, 576, 1536 * 288 - 1) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"wrap": 1},
        {"wrap": True},
        {"wrap": True, "wrap_block": 8},
        {"wrap": True, "wrap_block": 0, "wrap_stages": 1},
        {"wrap_block": 8},
        {"wrap_stages": -1},
        {"in_features": 0},
        {"out_features": 0},
    ],
    ids=str,
)
def test_what_is_refused(fields):
    with pytest.raises(OptionError):
        Sparse24(**{"in_features": 8, "out_features": 8, **fields})


@pytest.mark.parametrize("shape", [(256, 256), (256, 1024), (1022, 256)], ids=str)
def test_fresh_term_keeps_the_variance(shape):
    torch.manual_seed(0)
    assert 0.9 < Sparse24(*shape).build()(torch.randn(500, shape[0])).std() < 1.1


def multiply(module):
    with torch.no_grad():
        module.values.mul_(2)


def step(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    module(torch.randn(2, 102)).square().mean().backward()
    optimizer.step()


def other_state(module):
    state = module.state_dict()
    return {**state, "values": torch.randn_like(state["values"]), "positions": other_positions(module)}


def other_positions(module):
    return pack((unpack(module.positions, module.term.groups) + 1) % 4)


def replace_positions(module):
    module.positions = other_positions(module)


def write_positions(module):
    module.positions.copy_(other_positions(module))


def new_data(module):
    module.positions.data = other_positions(module)


CHANGES = {
    "in place": multiply,
    "optimizer": step,
    "load_state_dict": lambda module: module.load_state_dict(other_state(module)),
    "assign": lambda module: module.load_state_dict(other_state(module), assign=True),
    "half": lambda module: module.half().float(),
    "positions replaced": replace_positions,
    "positions written": write_positions,
    "positions of other data": new_data,
    "solve": lambda module: module.solve_(problem(102, 33)),
    "reset": lambda module: module.reset_parameters(),
    "train": lambda module: module.train().eval(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_matrix_is_made_again_after_a_change(change, form):
    module = built(form=form)
    for _ in range(4):
        before = kept_matrix(module)
        assert kept_matrix(module) is before
        CHANGES[change](module)
        assert_up_to_date(module)
        assert module._cache.blocks[0] is not before


@pytest.mark.parametrize("name", ["before.weight", "before.scale_in", "behind.scale_out", "behind.weight"])
def test_matrix_is_made_again_after_a_change_of_a_wrapper(name):
    module = built(form="wrapped")
    kept_matrix(module)
    with torch.no_grad():
        module.get_parameter(name).mul_(2)
    assert_up_to_date(module)


def test_matrix_is_that_of_the_dtype():
    module = built()
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            assert module(torch.randn(2, 102).to(dtype)).dtype == dtype


@pytest.mark.parametrize("form", FORMS)
def test_conversions_and_loading_drop_the_matrix_at_once(form):
    module = built(form=form)
    for change in (module.half, module.float, lambda: module.load_state_dict(other_state(module)), module.eval):
        kept_matrix(module.float())
        change()
        assert module._cache is None


@pytest.mark.parametrize("form", FORMS)
def test_nothing_but_the_matrix_is_kept(form):
    module = built(form=form)
    kept_matrix(module)
    assert all(getattr(child, "_cache", None) is None for child in module.children())


def test_loading_and_converting_by_swapped_tensors():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = built(form="wrapped")
        kept_matrix(module)
        module.load_state_dict(other_state(module))
        assert_up_to_date(module)
        module.double().float()
        assert_up_to_date(module)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_matrices_of_parametrizations_are_not_kept():
    module = built(form="wrapped")
    expected = 2 * dense(module)
    parametrize.register_parametrization(module.behind, "scale_out", Doubled())
    with torch.no_grad():
        torch.testing.assert_close(module(torch.eye(102)).t(), expected)
    assert module._cache is None


@pytest.mark.parametrize("name", ["values", "positions"])
def test_tensors_swapped_in_for_a_call(name):
    module = built()
    other = other_state(module)[name]
    matrix = copy.deepcopy(module)
    matrix.load_state_dict({**module.state_dict(), name: other})
    kept_matrix(module)
    with torch.no_grad():
        found = torch.func.functional_call(module, {name: other}, (torch.eye(102),))
    torch.testing.assert_close(found.t(), explicit(matrix))
    assert_up_to_date(module)


@pytest.mark.parametrize("name", ["values", "positions"])
def test_nothing_is_kept_for_inference_tensors(name):
    module = built()
    with torch.inference_mode():
        tensor = getattr(module, name).clone()
        setattr(module, name, torch.nn.Parameter(tensor) if name == "values" else tensor)
        assert_up_to_date(module)
        assert module._cache is None
        getattr(module, name).copy_(other_state(module)[name])
        assert_up_to_date(module)


def test_inference_mode_and_back():
    module = built()
    with torch.inference_mode():
        first = module(torch.eye(102))
    frozen = module.requires_grad_(False)
    x = torch.eye(102).requires_grad_()
    y = frozen(x)
    torch.testing.assert_close(y, first.clone())
    y.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_copies_leave_the_matrix_behind(form):
    module = built(form=form)
    x = torch.randn(4, 102)
    with torch.no_grad():
        expected = module(x)
        assert module._cache is not None
        for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
            assert other._cache is None
            assert torch.equal(other(x), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_state_dict_and_back(shape, form):
    module = built(shape, form)
    torch.manual_seed(1)
    other = Sparse24(*shape, **FORMS[form]).build()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.matrix(), module.matrix())
    with torch.device("meta"):
        empty = Sparse24(*shape, **FORMS[form]).build()
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty.matrix(), module.matrix())


@pytest.mark.parametrize("form", FORMS)
def test_meta(form):
    module = Sparse24(102, 33, **FORMS[form]).build(device="meta")
    x = torch.empty(4, 102, device="meta")
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    for grad in (True, False, False):
        with torch.set_grad_enabled(grad):
            assert module(x).shape == (4, 33)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_compile_without_graph_breaks(form, training):
    module = built(form=form)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(70, 102, requires_grad=training)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), module(x))
    if training:
        found = torch.autograd.grad(compiled(x).square().sum(), [x, *module.parameters()])
        wanted = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_transforms(form):
    module = built(form=form, dtype=torch.double)
    x = torch.randn(2, 5, 102, dtype=torch.double)
    torch.testing.assert_close(torch.vmap(module)(x), module.reference(x.flatten(0, 1)).unflatten(0, (2, 5)))
    tangent = torch.func.jvp(module, (x[0],), (x[1],))[1]
    torch.testing.assert_close(tangent, module.reference(x[1]))


@pytest.mark.parametrize(
    ("dtype", "out_features", "in_features", "capability", "taken"),
    [
        (torch.float16, 576, 1536, (8, 0), True),
        (torch.bfloat16, 32, 64, (9, 0), True),
        (torch.float32, 576, 1536, (8, 0), False),
        (torch.bfloat16, 576, 1536, (7, 5), False),
        (torch.bfloat16, 576, 1536, None, False),
        (torch.bfloat16, 33, 64, (9, 0), False),
        (torch.bfloat16, 32, 96, (9, 0), False),
    ],
)
def test_where_the_sparse_product_runs(dtype, out_features, in_features, capability, taken):
    assert takes_semi_structured(dtype, out_features, in_features, capability) is taken


def test_sizes_that_the_sparse_product_takes_are_those_of_torch():
    for backend in (SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS):
        for dtype in (torch.float16, torch.bfloat16):
            sizes = backend._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert 32 % sizes.sparse_min_rows == 64 % sizes.sparse_min_cols == 0


def test_the_sparse_product_is_not_taken_on_a_cpu():
    module = built((64, 32), dtype=torch.bfloat16)
    with torch.no_grad():
        module(torch.randn(3, 64, dtype=torch.bfloat16))
    assert type(module._cache.blocks[0]) is torch.Tensor


class OnCpu(SparseSemiStructuredTensorCUTLASS):
    """Torch's form and its dispatch, with a product that a CPU has."""

    @classmethod
    def from_dense(cls, matrix):
        packed, meta = sparse_semi_structured_from_dense_cutlass(matrix)
        return cls(matrix.shape, packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None)

    def _mm(self, B, *, bias=None, should_transpose_dense=False, **_):
        assert should_transpose_dense
        assert B.is_contiguous()
        y = B @ self.to_dense().t()
        return y if bias is None else y + bias


def test_sparse_product(monkeypatch):
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", OnCpu.from_dense)
    monkeypatch.setattr("spmconvert.operator.terms.sparse24._capability", lambda _: (8, 0))
    monkeypatch.setattr("spmconvert.operator.terms.sparse24.SPARSE_DEVICE", "cpu")
    module = built((128, 64), dtype=torch.bfloat16)
    x = torch.randn(5, 256, dtype=torch.bfloat16)[:, ::2]
    bias = torch.randn(64, dtype=torch.bfloat16)
    expected = module.reference(x).detach()
    y = torch.empty_like(expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
        assert type(module._cache.blocks[0]) is OnCpu
        torch.testing.assert_close(module.biased(x, bias), expected + bias)
        for given in (None, bias):
            module.write_(x, given, y)
            torch.testing.assert_close(y, expected if given is None else expected + bias)
        module.add_(x, y)
        torch.testing.assert_close(y, expected + bias + expected)
        assert module(x[:0]).shape == (0, 64)
        assert module(x.float()).dtype == torch.float32
        module.values.mul_(2)
        torch.testing.assert_close(module(x), 2 * expected)
        assert type(module._cache.blocks[0]) is OnCpu
        assert type(copy.deepcopy(module)(x)) is torch.Tensor
    module.requires_grad_(False)
    module(x.clone().requires_grad_()).sum().backward()
    assert type(module._cache.blocks[0]) is torch.Tensor


def test_beside_low_rank_in_a_layer():
    torch.manual_seed(0)
    layer = SPMLinear(102, 33, terms=[Sparse24(102, 33), LowRank(102, 33, 2)]).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(2, 150, 102)
    expected = torch.nn.functional.linear(x, layer.to_dense(), layer.held_bias)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert layer.design.stored_bytes(2, bias=False) == 2 * (33 * 52 + 135 * 2 + 1) + 33 * 13


def problem(in_features, out_features, metric=None, seed=0):
    """Inputs of few strong directions and of sizes that differ."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(in_features, in_features, generator=generator))[0]
    strength = torch.arange(1, in_features + 1) ** -1.0 + 1e-3
    sizes = torch.exp(0.5 * torch.randn(in_features, generator=generator))
    covariance = (basis * strength) @ basis.t() * sizes[:, None] * sizes
    weight = torch.randn(out_features, in_features, generator=generator)
    return LeastSquares(weight, covariance_root(covariance), metric)


def error(problem, matrix):
    """Squared error in the problem's norm, relative to the target."""

    def energy(difference):
        outputs = problem.root @ difference.t()
        return (outputs if problem.metric is None else problem.metric.root(outputs)).double().square().sum()

    return (energy(problem.weight - matrix) / energy(problem.weight)).item()


def masked(weight, cost):
    """The two of every four that cost most."""
    best = cost.unflatten(1, (-1, 4)).topk(2).indices
    kept = torch.zeros_like(cost).unflatten(1, (-1, 4)).scatter(2, best, 1.0).flatten(1)
    return weight * kept


def curvature(size):
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1)))[0]
    return OutputMetric.of((basis / torch.arange(1, size + 1)) @ basis.t())


@pytest.mark.parametrize("shape", [(64, 96), (192, 48)], ids=str)
def test_fit_beats_masks_by_magnitude_and_of_wanda(shape):
    task = problem(*shape)
    module = Sparse24(*shape).build()
    module.solve_(task)
    second = task.root.t() @ task.root
    wanda = masked(task.weight, task.weight.abs() * second.diagonal().sqrt())
    found = error(task, module.matrix())
    assert found < 0.6 * error(task, wanda) < error(task, masked(task.weight, task.weight.abs()))
    # also with the same refit
    refitted = refit(wanda, wanda != 0, task.weight, second, None, 500)
    assert found < error(task, refitted)


@pytest.mark.parametrize("shape", [(5, 7), (32, 40), (61, 24)], ids=str)
@pytest.mark.parametrize("coupled", [False, True])
def test_refit_is_the_least_squares_solution_and_never_worse_than_none(shape, coupled):
    task = problem(*shape, metric=curvature(shape[1]) if coupled else None)
    found, kept = (tensor[:, : shape[0]] for tensor in pruned(task))
    errors = [error(task, task.weight * kept), error(task, found)]
    second = (task.root.t() @ task.root).double()
    root = torch.eye(shape[1]) if task.metric is None else task.metric.root(torch.eye(shape[1]))
    metric = (root @ root).double()
    matrix = torch.kron(metric, second)[kept.flatten()][:, kept.flatten()]
    wanted = torch.linalg.solve(matrix, (metric @ task.weight.double() @ second).flatten()[kept.flatten()])
    best = torch.zeros(kept.shape, dtype=torch.double).masked_scatter(kept, wanted).float()
    assert error(task, best) <= errors[1] * (1 + 1e-6)
    assert errors[1] <= errors[0]
    assert errors[1] <= 1.05 * error(task, best)


def test_more_steps_are_never_worse():
    task = problem(64, 96, metric=curvature(96))
    second = task.root.t() @ task.root
    kept = masked(task.weight, task.weight.abs()) != 0
    for metric in (None, task.metric):
        norm = LeastSquares(task.weight, task.root, metric)
        errors = [error(norm, refit(task.weight * kept, kept, task.weight, second, metric, steps)) for steps in range(12)]
        assert all(after < before for before, after in itertools.pairwise(errors))


def test_fit_minimises_in_the_metric():
    task = problem(64, 96, metric=curvature(96))
    module = Sparse24(64, 96).build()
    module.solve_(LeastSquares(task.weight, task.root))
    without = error(task, module.matrix())
    module.solve_(task)
    assert error(task, module.matrix()) < 0.8 * without


def test_mask_of_uncorrelated_inputs_is_wandas():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(torch.randn(32, generator=generator))
    weight = torch.randn(24, 32, generator=generator)
    module = Sparse24(32, 24).build()
    module.solve_(LeastSquares(weight, torch.diag(sizes)))
    torch.testing.assert_close(module.matrix(), masked(weight, weight.abs() * sizes))


@pytest.mark.parametrize("inputs", [100, 256, 300])
def test_mask_of_blocks_is_that_of_single_inputs(inputs, monkeypatch):
    task = problem(inputs, 8)
    second = task.root.t() @ task.root
    correlation = second / second.diagonal().sqrt() / second.diagonal().sqrt()[:, None]
    exists = torch.ones(inputs, dtype=torch.bool)
    found = choose(task.weight, correlation, exists)
    monkeypatch.setattr("spmconvert.operator.pruning.BLOCK", 4)
    for one, other in zip(found, choose(task.weight, correlation, exists), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_weight_that_is_sparse_already_is_found():
    task = problem(64, 48)
    weight = masked(task.weight, torch.rand(task.weight.shape))
    module = Sparse24(64, 48).build()
    module.solve_(task.leaving(weight))
    torch.testing.assert_close(module.matrix(), weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("root", [torch.zeros(5, 10), torch.eye(10)[:3], torch.ones(1, 10)], ids=["none", "few", "equal"])
def test_inputs_that_determine_little(root):
    weight = torch.randn(6, 10)
    module = Sparse24(10, 6).build()
    module.solve_(LeastSquares(weight, root))
    assert module.values.isfinite().all()
    assert (root @ (weight - module.matrix()).t()).norm() <= (root @ weight.t()).norm() * (1 + 1e-5)


@pytest.mark.parametrize("shape", [*SHAPES, (64, 64)], ids=str)
@pytest.mark.parametrize("block", [1, 4, 8])
def test_wrapped_start_is_the_bare_core(shape, block):
    task, x = problem(*shape), torch.randn(9, shape[0])
    bare = Sparse24(*shape).build()
    bare.solve_(task)
    wrapped = Sparse24(*shape, wrap=True, wrap_block=block, wrap_stages=2).build()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.normal_()
    wrapped.start_(task, seed=0)
    assert torch.equal(wrapped.matrix(), bare.matrix())
    # products of one matrix in two layouts may round differently
    torch.testing.assert_close(wrapped(x), bare(x))
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), bare(x))


def test_wrapped_is_fitted_by_a_gradient():
    bare, wrapped = (Sparse24(32, 24, **form).build() for form in FORMS.values())
    assert bare.term.closed_form
    assert not wrapped.term.closed_form
    task = problem(32, 24)
    wrapped.start_(task, seed=0)
    unknowns = wrapped.unknowns()
    assert {id(parameter) for parameter, _ in unknowns} == {id(parameter) for parameter in wrapped.parameters()}
    assert all(size > 0 for _, size in unknowns)

    def loss():
        return (task.root @ (task.weight - wrapped.matrix()).t()).square().sum()

    start = loss().item()
    optimizer = torch.optim.Adam([{"params": [parameter], "lr": 0.01 * size} for parameter, size in unknowns])
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.7 * start


@pytest.mark.parametrize("form", FORMS)
def test_matrix_is_proportional_to_the_scale_parameter(form):
    module = built(form=form)
    before = module.matrix()
    with torch.no_grad():
        module.scale_parameter().mul_(3)
    torch.testing.assert_close(module.matrix(), 3 * before)
