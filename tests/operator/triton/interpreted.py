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

# shape, tokens, dtype, (variant, block, stages), tokens from which two passes are fused
CASES = [
    ((96, 96), 37, torch.float32, ("general", 1, None), None),
    ((96, 96), 37, torch.float16, ("rotation", 1, None), 17),
    ((96, 96), 37, torch.bfloat16, ("general", 1, None), 17),
    ((64, 256), 2, torch.float16, ("general", 1, None), None),  # whole tiles in the blocks, few tokens
    ((256, 64), 1, torch.float32, ("general", 1, None), None),  # whole rows in the blocks, few tokens
    ((64, 256), 20, torch.float16, ("general", 1, None), 17),
    ((64, 88), 18, torch.float16, ("general", 1, None), None),  # partial tiles
    ((88, 64), 18, torch.float16, ("rotation", 1, None), 17),  # partial rows
    ((70, 130), 35, torch.float16, ("general", 1, None), 17),  # expand and fold by themselves
    ((130, 70), 35, torch.float32, ("general", 1, None), None),
    ((130, 40), 2, torch.float16, ("general", 1, None), None),  # folded more than twice
    ((140, 140), 20, torch.float16, ("general", 2, None), None),
    ((210, 204), 19, torch.float16, ("general", 3, None), 17),
    ((96, 96), 20, torch.float32, ("general", 1, 3), None),  # one pass, and not dense
    ((80, 80), 20, torch.float16, ("general", 1, 11), 17),  # two fused launches, the second pass incomplete
    ((7, 13), 4, torch.float32, ("general", 1, None), None),  # dense
]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill every allocation with NaN: what a kernel does not write shows."""
    original = torch.Tensor.new_empty

    def allocate(self, *sizes, **options):
        return original(self, *sizes, **options).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)


@pytest.fixture(autouse=True)
def merge_by_pytorch(monkeypatch):
    """Interpreting the merge takes seconds a layer; the tests that are about it turn it on again."""
    monkeypatch.setattr(tiles, "MERGED_SIDE", 0)


@pytest.fixture
def merge_by_triton(merge_by_pytorch, monkeypatch):
    monkeypatch.setattr(tiles, "MERGED_SIDE", 128)


@pytest.mark.parametrize(("shape", "tokens", "dtype", "design", "fused"), CASES, ids=str)
def test_within_twice_the_error_of_the_merged_form(shape, tokens, dtype, design, fused, monkeypatch):
    monkeypatch.setattr(tiles, "FUSED_TOKENS", fused or tiles.FUSED_TOKENS)
    if fused:
        # fewer programs than tiles of tokens, so that programs go round
        monkeypatch.setattr(tiles, "WARPS", 1)
        monkeypatch.setattr(launches, "INTERPRETED_MULTIPROCESSORS", 1)
    variant, block, stages = design
    assert_within_twice(Geometry.create(*shape, stages, variant, block), tokens, dtype)


@pytest.mark.parametrize(("shape", "tokens"), [((96, 96), 18), ((40, 128), 18), ((128, 100), 2)], ids=str)
def test_three_groups(shape, tokens, monkeypatch):
    monkeypatch.setattr(geometry_module, "TWO_GROUP_BLOCKS", 64)
    monkeypatch.setattr(tiles, "FUSED_TOKENS", 18)
    geometry = Geometry.create(*shape)
    assert len(merge_plan(geometry).groups) == 3
    assert_within_twice(geometry, tokens, torch.float16)


def test_outputs_that_fold_often_are_summed_exactly():
    geometry = Geometry.create(200, 3)
    plan = merge_plan(geometry)
    x, *parameters, bias = (p.detach() for p in tensors(geometry, 18))
    blocks = merge_stages(*parameters, plan)
    half = [tensor.half() for tensor in (x, bias, *blocks)]
    target = apply_blocks(half[0].double(), [block.double() for block in half[2:]], half[1].double(), plan)
    plain, found = (run(half[0], half[2:], half[1], plan).double() for run in (apply_blocks, apply_blocks_triton))
    assert relative(found, target) <= 1.5 * relative(plain, target)


def test_blocks_wider_than_a_tile(monkeypatch):
    smaller = {key: (entries[0]._replace(batches=16, columns=16, rows=16),) for key, entries in tiles._CANDIDATES.items()}
    monkeypatch.setattr(tiles, "_CANDIDATES", smaller)
    monkeypatch.setattr(tiles, "FUSED_TOKENS", 17)
    for dtype in (torch.float16, torch.float32):
        assert_within_twice(Geometry.create(160, 150, block=5), 18, dtype)


def merged(merge, parameters, plan):
    """Blocks, and gradients of everything that went into them."""
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    blocks = merge(*leaves, plan)
    grads = [torch.randn(b.shape, generator=torch.Generator().manual_seed(3), dtype=torch.double) for b in blocks]
    found = torch.autograd.grad(blocks, leaves, [g.to(b.dtype) for g, b in zip(grads, blocks, strict=True)])
    return [*(block.detach() for block in blocks), *found]


# two groups; an incomplete last group; a dense matrix of two tiles of columns
@pytest.mark.parametrize(("shape", "stages"), [((66, 80), None), ((66, 66), 5), ((20, 18), None)], ids=str)
def test_stages_are_merged(shape, stages, merge_by_triton):
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
    geometry = Geometry.create(140, 140, None, *design)
    _, *parameters, _ = tensors(geometry, 1)
    plan = merge_plan(geometry)
    assert all(map(torch.equal, merge_stages_triton(*parameters, plan), merge_stages(*parameters, plan)))


def test_non_contiguous_inputs():
    tokens = 18
    views = [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x], 1)[:, 1],
        lambda x: x[:1].expand(tokens, -1),
        lambda x: torch.cat([x, x], 1)[:, 3:99],
    ]
    for view in views:
        assert_within_twice(Geometry.create(96, 96), tokens, torch.float32, view)


@pytest.mark.parametrize("wanted", [[0], [1, 3], [4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_only_some_gradients(wanted, dtype, monkeypatch):
    # in float16 the passes are fused, and without gradients of the blocks nothing between them is kept
    monkeypatch.setattr(tiles, "FUSED_TOKENS", 17)
    monkeypatch.setattr(tiles, "WARPS", 1)
    monkeypatch.setattr(launches, "INTERPRETED_MULTIPROCESSORS", 1)
    assert_within_twice(Geometry.create(96, 80), 40, dtype, wanted=wanted)


def test_no_tokens():
    layer = SPMLinear(66, 80, backend="triton")
    x = torch.zeros(2, 0, 66, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (2, 0, 66)
    assert not layer.weight.grad.any()


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
    plain, triton = layers(66, 66, rank=3)
    x = torch.randn(2, 5, 66)
    with torch.no_grad():
        torch.testing.assert_close(triton(x), plain(x))
        cached = triton._cache.blocks
        torch.testing.assert_close(triton(x), plain(x))
        assert triton._cache.blocks is cached
    for layer in (plain, triton):
        layer(x).square().sum().backward()
    for one, other in zip(triton.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_autocast():
    plain, triton = layers(96, 96)
    x = torch.randn(20, 96)
    with torch.autocast("cpu", torch.float16):
        y = triton(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), plain(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(training, monkeypatch):
    monkeypatch.setattr(tiles, "MERGED_SIDE", 0 if training else 128)
    _, layer = layers(66, 70)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(18, 66, requires_grad=training)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), layer(x))
    if training:
        found = torch.autograd.grad(compiled(x).sum(), [x, *layer.parameters()])
        expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
        torch.testing.assert_close(found, expected)


def test_export_with_any_number_of_tokens():
    _, layer = layers(66, 66)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(layer.eval(), (torch.randn(4, 66),), dynamic_shapes=({0: tokens},))
    assert "spmconvert.mix.default" in str(program.graph)
    for count in (2, 18):
        x = torch.randn(count, 66)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_operators_keep_their_promises():
    geometry = Geometry.create(66, 70)
    plan = merge_plan(geometry)
    x, *parameters, bias = (p.detach().float() for p in tensors(geometry, 3))
    blocks = [block.requires_grad_() for block in merge_stages(*parameters, plan)]
    shape = [66, 70, 1, *(group.inner for group in plan.groups)]
    arguments = (x.requires_grad_(), blocks, bias.requires_grad_(), shape, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")

    def assert_kept(operator, given):
        assert set(torch.library.opcheck(operator, given, test_utils=checks).values()) == {"SUCCESS"}

    assert_kept(triton_ops.mix, arguments)
    hidden = [torch.randn(3, blocks[0].shape[0] * blocks[0].shape[1])]
    backward = (torch.randn(3, 70), x.detach(), [b.detach() for b in blocks], hidden, shape, True, True)
    assert_kept(triton_ops.mix_backward, backward)
    stages, *scales = (p.detach().requires_grad_() for p in parameters)
    groups = [n for g in plan.groups for n in (g.first_stage, g.stages, g.outer, g.middle, g.inner)]
    tensors_of_merge = (stages.view(geometry.stages, 2, geometry.width), *scales)
    assert_kept(merge_ops.merge, (*tensors_of_merge, groups))
    grads = [torch.randn_like(block) for block in merge_ops.merge(*tensors_of_merge, groups)]
    detached = [p.detach() for p in tensors_of_merge]
    assert_kept(merge_ops.merge_backward, (grads, *detached, groups))


def test_second_derivative():
    plain, triton = layers(66, 66)
    x = torch.randn(18, 66, requires_grad=True)
    found = []
    for layer in (plain, triton):
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, layer.weight, layer.scale_in]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_a_second_backward_is_the_first(merge_by_triton):
    _, layer = layers(66, 66)
    x = torch.randn(20, 66, requires_grad=True)
    loss = layer(x).square().sum()
    first, second = (torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_results_are_the_same_in_every_run():
    _, layer = layers(66, 66)
    x = torch.randn(70, 66)
    runs = [torch.autograd.grad(layer(x).square().sum(), layer.weight)[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_dtypes_that_are_refused():
    with pytest.raises(BackendError, match="input is float64"):
        SPMLinear(66, 66, backend="triton")(torch.ones(2, 66, dtype=torch.double))


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
@pytest.mark.parametrize("shape", [(66, 66), (8, 8)], ids=str)
def test_transforms_are_refused_and_run_by_the_backends_that_the_error_names(transform, shape):
    layer = SPMLinear(*shape, backend="triton")
    x = torch.randn(3, shape[0])
    with pytest.raises(BackendError, match=r"put a batch into the tokens, or use backend merged or reference"):
        TRANSFORMS[transform](layer, x)
    expected = layer(x)
    for layer.backend in ("merged", "reference"):
        torch.testing.assert_close(TRANSFORMS[transform](layer, x), expected, rtol=1e-4, atol=1e-4)


def test_blocks_are_neither_made_nor_run_under_a_transform():
    plan = merge_plan(Geometry.create(66, 66))
    x, *parameters, _ = (p.detach().float() for p in tensors(plan.geometry, 3))
    blocks = merge_stages(*parameters, plan)
    for call in (
        lambda scale: merge_stages_triton(parameters[0] * scale, *parameters[1:], plan)[0],
        lambda scale: apply_blocks_triton(x * scale, blocks, None, plan),
    ):
        with pytest.raises(BackendError, match=r"cannot run under torch\.func"):
            torch.func.jvp(call, (torch.ones(()),), (torch.ones(()),))


def test_batched_gradients_are_refused_and_run_by_the_backend_that_the_error_names(merge_by_triton):
    layer = SPMLinear(66, 66, backend="triton")
    x, grads = torch.randn(3, 66, requires_grad=True), torch.randn(2, 3, 66)

    def batched(outputs, leaf, given):
        return torch.vmap(lambda grad: torch.autograd.grad(outputs, leaf, grad)[0])(given)

    expected = [torch.autograd.grad(layer(x), x, grad)[0] for grad in grads]
    with pytest.raises(BackendError, match="take one at a time, or use backend reference"):
        batched(layer(x), x, grads)
    blocks = merge_stages_triton(layer.weight, layer.scale_in, layer.scale_out, layer.plan)
    with pytest.raises(BackendError, match="take one at a time, or use backend reference"):
        batched(blocks, layer.weight, [torch.ones(2, *block.shape) for block in blocks])
    layer.backend = "reference"
    torch.testing.assert_close(batched(layer(x), x, grads), torch.stack(expected))
