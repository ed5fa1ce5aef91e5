"""Cases of ``test_kernels.py``: the kernels against the reference in float64, with TRITON_INTERPRET=1."""

import pytest
import torch
from torch.autograd import forward_ad

from spmconvert.errors import BackendError
from spmconvert.operator import geometry as geometry_module
from spmconvert.operator.dispatch import interprets_triton
from spmconvert.operator.geometry import Geometry
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.merged import apply_blocks, merge_plan, merge_stages
from spmconvert.operator.triton import launches, tiles
from spmconvert.operator.triton import merge as merge_ops
from spmconvert.operator.triton import mix as triton_ops
from spmconvert.operator.triton.merge import merge_stages_triton
from spmconvert.operator.triton.mix import apply_blocks_triton
from tests.operator.accuracy import assert_within_twice
from tests.operator.test_merged import relative, tensors

assert interprets_triton()

# Every program is interpreted in Python, so layers are as small as they can be: ``small_groups`` gives a width of 12 two
# groups and makes three tokens many. 18 tokens are more than one tile of an interleaved pass, and the second is not whole.
# shape, tokens, dtype, (variant, block, stages), whether two passes are fused
CASES = [
    ((12, 12), 18, torch.float32, ("general", 1, None), False),  # blocks of 4 and of 3, neither fills its tile
    ((12, 12), 18, torch.float16, ("rotation", 1, None), True),  # two passes in one launch
    ((12, 12), 18, torch.bfloat16, ("general", 1, None), True),  # bfloat16, which the interpreter has to compute in float32
    ((8, 32), 2, torch.float16, ("general", 1, None), False),  # whole tiles of the input in the blocks, few tokens
    ((32, 8), 1, torch.float32, ("general", 1, None), False),  # whole rows of the output in the blocks, few tokens
    ((8, 32), 18, torch.float16, ("general", 1, None), True),  # blocks that are not square, in one launch
    ((10, 14), 18, torch.float16, ("general", 1, None), False),  # partial tiles in the blocks
    ((12, 8), 18, torch.float16, ("rotation", 1, None), True),  # partial rows in the blocks
    ((9, 15), 18, torch.float16, ("general", 1, None), True),  # expand and fold by themselves, in one launch
    ((15, 9), 18, torch.float32, ("general", 1, None), False),  # and in two
    ((18, 5), 2, torch.float16, ("general", 1, None), False),  # folded more than twice, few tokens
    ((20, 24), 18, torch.float16, ("general", 2, None), False),  # two coordinates that stay together
    ((33, 30), 18, torch.float16, ("general", 3, None), True),  # three, which are no power of two
    ((12, 12), 18, torch.float32, ("general", 1, 1), False),  # one pass, and not dense
    ((24, 24), 18, torch.float16, ("general", 1, 8), True),  # two fused launches, the last pass incomplete
    ((7, 5), 4, torch.float32, ("general", 1, None), False),  # dense: no pass
]
# the same with ``small_tiles``, so that there are several in every direction
TILED_CASES = [
    # tiles of batches and of tokens, the last ones incomplete; where one tile holds all blocks, programs share the tokens
    ((12, 12), 9, torch.float32, False),
    # tiles of rows and of columns: blocks of 5 do not fit in one
    ((20, 20), 5, torch.float16, False),
    # the same in a fused launch, whose programs take several tiles of tokens
    ((20, 20), 9, torch.float16, True),
    # few tokens: tiles of rows
    ((8, 20), 2, torch.float16, False),
]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Two groups where a layer of a model would have one, and few tokens where they would be more."""
    monkeypatch.setattr(geometry_module, "SINGLE_GROUP_BLOCKS", 8)
    monkeypatch.setattr(tiles, "FEW_TOKENS", 2)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of four tokens, rows and columns, and fewer programs than tiles, so that programs go round."""
    entries = {"few": tiles.Tile(1, 1, 2, 8, 1, 1, 1)}
    candidates = {key: (entries.get(key[0], tiles.Tile(8, 4, 4, 4, 4, 1, 1)),) for key in tiles._CANDIDATES}
    monkeypatch.setattr(tiles, "_CANDIDATES", candidates)
    monkeypatch.setattr(tiles, "SMALLEST_SIDE", 2)
    monkeypatch.setattr(tiles, "SECTOR_BYTES", 8)
    monkeypatch.setattr(tiles, "MERGED_COLUMNS", 4)
    monkeypatch.setattr(tiles, "WARPS", 1)


@pytest.fixture
def fuses(monkeypatch):
    """Two passes run in one launch from the first number of tokens that is not few."""
    monkeypatch.setattr(tiles, "FUSED_TOKENS", 3)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill every allocation with NaN: what a kernel does not write shows."""
    original = torch.Tensor.new_empty

    def allocate(self, *sizes, **options):
        return original(self, *sizes, **options).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)


@pytest.fixture(autouse=True)
def merge_by_pytorch(monkeypatch):
    """Interpreting the merge takes longest; the tests that are about it turn it on again."""
    monkeypatch.setattr(tiles, "MERGED_SIDE", 0)


@pytest.fixture
def merge_by_triton(merge_by_pytorch, monkeypatch):
    monkeypatch.setattr(tiles, "MERGED_SIDE", 128)


@pytest.mark.parametrize(("shape", "tokens", "dtype", "design", "fused"), CASES, ids=str)
def test_within_twice_the_error_of_the_merged_form(shape, tokens, dtype, design, fused, request):
    if fused:
        request.getfixturevalue("fuses")
    variant, block, stages = design
    assert_within_twice(Geometry.create(*shape, stages, variant, block), tokens, dtype)


@pytest.mark.parametrize(("shape", "tokens", "dtype", "fused"), TILED_CASES, ids=str)
def test_several_tiles_in_every_direction(shape, tokens, dtype, fused, small_tiles, request):
    if fused:
        request.getfixturevalue("fuses")
    assert_within_twice(Geometry.create(*shape), tokens, dtype)


@pytest.mark.parametrize(("shape", "tokens"), [((12, 12), 18), ((5, 16), 18), ((16, 11), 2)], ids=str)
def test_three_groups(shape, tokens, fuses, monkeypatch):
    monkeypatch.setattr(geometry_module, "TWO_GROUP_BLOCKS", 8)
    geometry = Geometry.create(*shape)
    assert len(merge_plan(geometry).groups) == 3
    assert_within_twice(geometry, tokens, torch.float16)


def test_outputs_that_fold_often_are_summed_exactly():
    geometry = Geometry.create(200, 3)
    plan = merge_plan(geometry)
    x, *parameters, bias = (p.detach() for p in tensors(geometry, 9))
    blocks = merge_stages(*parameters, plan)
    half = [tensor.half() for tensor in (x, bias, *blocks)]
    target = apply_blocks(half[0].double(), [block.double() for block in half[2:]], half[1].double(), plan)
    plain, found = (run(half[0], half[2:], half[1], plan).double() for run in (apply_blocks, apply_blocks_triton))
    assert relative(found, target) <= 1.5 * relative(plain, target)


def merged(merge, parameters, plan):
    """Blocks, and gradients of everything that went into them."""
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    blocks = merge(*leaves, plan)
    grads = [torch.randn(b.shape, generator=torch.Generator().manual_seed(3), dtype=torch.double) for b in blocks]
    found = torch.autograd.grad(blocks, leaves, [g.to(b.dtype) for g, b in zip(grads, blocks, strict=True)])
    return [*(block.detach() for block in blocks), *found]


# two groups, of 4 and of 3 rows; an incomplete last group of 5 rows; a dense matrix; the last two have two tiles of columns
@pytest.mark.parametrize(("shape", "stages"), [((12, 11), None), ((20, 20), 4), ((6, 5), None)], ids=str)
def test_stages_are_merged(shape, stages, small_tiles, merge_by_triton):
    geometry = Geometry.create(*shape, stages)
    _, *exact, _ = tensors(geometry, 1)
    single, plan = [p.float() for p in exact], merge_plan(geometry)
    results = (
        merged(f, p, plan) for f, p in ((merge_stages_triton, single), (merge_stages, single), (merge_stages, exact))
    )
    for one, own, target in zip(*results, strict=True):
        assert relative(one.double(), target) <= 2 * relative(own.double(), target) + 1e-7


@pytest.mark.parametrize("design", [("rotation", 1), ("general", 2)], ids=str)
def test_other_designs_are_merged_by_pytorch(design, merge_by_triton, monkeypatch):
    monkeypatch.setattr(merge_ops, "merge", None)
    geometry = Geometry.create(24, 24, None, *design)
    _, *parameters, _ = tensors(geometry, 1)
    plan = merge_plan(geometry)
    assert all(map(torch.equal, merge_stages_triton(*parameters, plan), merge_stages(*parameters, plan)))


def test_non_contiguous_inputs():
    tokens = 9
    views = [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x], 1)[:, 1],
        lambda x: x[:1].expand(tokens, -1),
        lambda x: torch.cat([x, x], 1)[:, 3:15],
    ]
    for view in views:
        assert_within_twice(Geometry.create(12, 12), tokens, torch.float32, view)


@pytest.mark.parametrize("wanted", [[0], [1, 3], [4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_only_some_gradients(wanted, dtype, fuses, monkeypatch):
    monkeypatch.setattr(tiles, "WARPS", 1)
    monkeypatch.setattr(launches, "INTERPRETED_MULTIPROCESSORS", 1)
    # in float16 the passes are fused, and without gradients of the blocks nothing between them is kept
    assert_within_twice(Geometry.create(12, 11), 18, dtype, wanted=wanted)


def test_no_tokens():
    layer = SPMLinear(10, 12, backend="triton")
    x = torch.zeros(2, 0, 10, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (2, 0, 10)
    assert not layer.spm.weight.grad.any()


def layers(*shape, **design):
    """The same layer by both backends."""
    torch.manual_seed(0)
    plain = SPMLinear(*shape, backend="merged", **design)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    triton = SPMLinear(*shape, backend="triton", **design)
    triton.load_state_dict(plain.state_dict())
    return plain, triton


def test_layer_in_inference_and_training(merge_by_triton):
    plain, triton = layers(12, 12, rank=3)
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        torch.testing.assert_close(triton(x), plain(x))
        cached = triton.spm._cache.blocks
        torch.testing.assert_close(triton(x), plain(x))
        assert triton.spm._cache.blocks is cached
    for layer in (plain, triton):
        layer(x).square().sum().backward()
    for one, other in zip(triton.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_autocast():
    plain, triton = layers(12, 12)
    x = torch.randn(9, 12)
    with torch.autocast("cpu", torch.float16):
        y = triton(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), plain(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(training, monkeypatch):
    monkeypatch.setattr(tiles, "MERGED_SIDE", 0 if training else 128)
    _, layer = layers(10, 14)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 10, requires_grad=training)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), layer(x))
    if training:
        found = torch.autograd.grad(compiled(x).sum(), [x, *layer.parameters()])
        expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
        torch.testing.assert_close(found, expected)


def test_export_with_any_number_of_tokens():
    _, layer = layers(12, 12)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(layer.eval(), (torch.randn(4, 12),), dynamic_shapes=({0: tokens},))
    assert "spmconvert.mix.default" in str(program.graph)
    for count in (2, 9):
        x = torch.randn(count, 12)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_operators_keep_their_promises():
    geometry = Geometry.create(9, 15)
    plan = merge_plan(geometry)
    x, *parameters, bias = (p.detach().float() for p in tensors(geometry, 3))
    blocks = [block.requires_grad_() for block in merge_stages(*parameters, plan)]
    shape = [9, 15, 1, *(group.inner for group in plan.groups)]
    arguments = (x.requires_grad_(), blocks, bias.requires_grad_(), shape, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")

    def assert_kept(operator, given):
        assert set(torch.library.opcheck(operator, given, test_utils=checks).values()) == {"SUCCESS"}

    assert_kept(triton_ops.mix, arguments)
    hidden = [torch.randn(3, blocks[0].shape[0] * blocks[0].shape[1])]
    backward = (torch.randn(3, 15), x.detach(), [b.detach() for b in blocks], hidden, shape, True, True)
    assert_kept(triton_ops.mix_backward, backward)
    stages, *scales = (p.detach().requires_grad_() for p in parameters)
    groups = [n for g in plan.groups for n in (g.first_stage, g.stages, g.outer, g.middle, g.inner)]
    tensors_of_merge = (stages.view(geometry.stages, 2, geometry.width), *scales)
    assert_kept(merge_ops.merge, (*tensors_of_merge, groups))
    grads = [torch.randn_like(block) for block in merge_ops.merge(*tensors_of_merge, groups)]
    detached = [p.detach() for p in tensors_of_merge]
    assert_kept(merge_ops.merge_backward, (grads, *detached, groups))


def test_second_derivative():
    plain, triton = layers(12, 12)
    x = torch.randn(9, 12, requires_grad=True)
    found = []
    for layer in (plain, triton):
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, layer.spm.weight, layer.spm.scale_in]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_a_second_backward_is_the_first(merge_by_triton):
    _, layer = layers(12, 12)
    x = torch.randn(9, 12, requires_grad=True)
    loss = layer(x).square().sum()
    first, second = (torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_results_are_the_same_in_every_run():
    _, layer = layers(12, 12)
    x = torch.randn(9, 12)
    runs = [torch.autograd.grad(layer(x).square().sum(), layer.spm.weight)[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_dtypes_that_are_refused():
    with pytest.raises(BackendError, match="input is float64"):
        SPMLinear(12, 12, backend="triton")(torch.ones(2, 12, dtype=torch.double))


def by_forward_mode(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent + layer.bias


# every one gives the outputs of an affine layer
TRANSFORMS = {
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,))[1] + layer.bias,
    "jacrev": lambda layer, x: x @ torch.func.jacrev(layer)(x[0]).t() + layer.bias,
    "forward mode": by_forward_mode,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(12, 12), (8, 8)], ids=str)
def test_transforms_are_refused_and_run_by_the_backends_that_the_error_names(transform, shape):
    layer = SPMLinear(*shape, backend="triton")
    x = torch.randn(3, shape[0])
    with pytest.raises(BackendError, match=r"put a batch into the tokens, or use backend merged or reference"):
        TRANSFORMS[transform](layer, x)
    expected = layer(x)
    for layer.spm.backend in ("merged", "reference"):
        torch.testing.assert_close(TRANSFORMS[transform](layer, x), expected, rtol=1e-4, atol=1e-4)


def test_blocks_are_neither_made_nor_run_under_a_transform():
    plan = merge_plan(Geometry.create(12, 12))
    x, *parameters, _ = (p.detach().float() for p in tensors(plan.geometry, 3))
    blocks = merge_stages(*parameters, plan)
    for call in (
        lambda scale: merge_stages_triton(parameters[0] * scale, *parameters[1:], plan)[0],
        lambda scale: apply_blocks_triton(x * scale, blocks, None, plan),
    ):
        with pytest.raises(BackendError, match=r"cannot run under torch\.func"):
            torch.func.jvp(call, (torch.ones(()),), (torch.ones(()),))


def test_batched_gradients_are_refused_and_run_by_the_backend_that_the_error_names(merge_by_triton):
    layer = SPMLinear(12, 12, backend="triton")
    x, grads = torch.randn(3, 12, requires_grad=True), torch.randn(2, 3, 12)

    def batched(outputs, leaf, given):
        return torch.vmap(lambda grad: torch.autograd.grad(outputs, leaf, grad)[0])(given)

    expected = [torch.autograd.grad(layer(x), x, grad)[0] for grad in grads]
    with pytest.raises(BackendError, match="take one at a time, or use backend reference"):
        batched(layer(x), x, grads)
    blocks = merge_stages_triton(layer.spm.weight, layer.spm.scale_in, layer.spm.scale_out, layer.spm.plan)
    with pytest.raises(BackendError, match="take one at a time, or use backend reference"):
        batched(blocks, layer.spm.weight, [torch.ones(2, *block.shape) for block in blocks])
    layer.spm.backend = "reference"
    torch.testing.assert_close(batched(layer(x), x, grads), torch.stack(expected))
