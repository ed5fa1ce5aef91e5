"""The merged form against the reference: forward and every gradient, every way the blocks can be laid out."""

import pytest
import torch

from spmconvert.operator import merged
from spmconvert.operator.chunks import CHUNK_TOKENS
from spmconvert.operator.geometry import Geometry
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.merged import apply_blocks, merge_plan, merge_stages, merged_forward
from spmconvert.operator.reference import reference_forward
from tests.operator.dense import random_parameters

# widths above 64 blocks have two groups, above 8192 three; the comments say how expand and fold are carried out
SHAPES = [
    (1, 1),
    (7, 13),
    (64, 64),
    (96, 96),
    (97, 33),
    (128, 512),  # whole tiles in the blocks
    (512, 128),  # whole rows in the blocks
    (64, 88),  # partial tiles in the blocks
    (88, 64),  # partial rows in the blocks
    (70, 130),  # expand by itself
    (130, 70),  # fold by itself
]
DESIGNS = [("general", 1), ("rotation", 1), ("general", 2)]


def tensors(geometry, tokens, dtype=torch.double):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, geometry.in_features, generator=generator, dtype=torch.double).to(dtype)
    bias = torch.randn(geometry.out_features, generator=generator, dtype=torch.double).to(dtype)
    return [p.requires_grad_() for p in (x, *random_parameters(geometry, dtype=dtype), bias)]


def by_reference(x, weight, scale_in, scale_out, bias, geometry):
    return reference_forward(x, weight, scale_in, scale_out, geometry) + bias


def gradients(run, inputs, geometry, grad):
    return torch.autograd.grad(run(*inputs, geometry), inputs, grad)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("tokens", [1, 5, 3 * merged.CHUNK_TOKENS + 7])
@pytest.mark.parametrize(("variant", "block"), DESIGNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stages", [None, 1, 11])
def test_equals_the_reference(shape, variant, block, stages, tokens):
    geometry = Geometry.create(*shape, stages, variant, block)
    inputs = tensors(geometry, tokens)
    expected = by_reference(*inputs, geometry)
    assert relative(merged_forward(*inputs, geometry), expected) < 1e-12
    with torch.no_grad():
        assert relative(merged_forward(*inputs, geometry), expected) < 1e-12
    grad = torch.randn_like(expected)
    pairs = zip(
        gradients(merged_forward, inputs, geometry, grad), gradients(by_reference, inputs, geometry, grad), strict=True
    )
    for found, wanted in pairs:
        assert relative(found, wanted) < 1e-11


@pytest.mark.parametrize("shape", [(8400, 300), (300, 8400), (8400, 8400)], ids=str)
def test_three_groups(shape):
    geometry = Geometry.create(*shape)
    assert len(merge_plan(geometry).groups) == 3
    inputs = tensors(geometry, 3)
    expected = by_reference(*inputs, geometry)
    assert relative(merged_forward(*inputs, geometry), expected) < 1e-12
    grad = torch.randn_like(expected)
    pairs = zip(
        gradients(merged_forward, inputs, geometry, grad), gradients(by_reference, inputs, geometry, grad), strict=True
    )
    assert all(relative(found, wanted) < 1e-11 for found, wanted in pairs)


def test_every_layout_is_covered():
    plans = [merge_plan(Geometry.create(*shape)) for shape in SHAPES]
    assert any(plan.dense for plan in plans)
    assert any(plan.input_tiles for plan in plans)
    assert any(plan.output_rows for plan in plans)
    partial = merge_plan(Geometry.create(64, 88))
    assert partial.input_tiles * 64 > 88
    neither = merge_plan(Geometry.create(70, 130))
    assert not neither.dense
    assert not neither.input_tiles


@pytest.mark.parametrize("tokens", [20, 300])
@pytest.mark.parametrize("shape", [(96, 96), (128, 512), (130, 70)], ids=str)
def test_non_contiguous_inputs(shape, tokens):
    geometry = Geometry.create(*shape)
    x, *rest = tensors(geometry, tokens)
    for view in (x.detach().t().contiguous().t(), torch.stack([x, x], 2)[..., 0], x[:1].expand(tokens, -1), x[::2]):
        assert relative(merged_forward(view, *rest, geometry), by_reference(view, *rest, geometry)) < 1e-12


def test_no_tokens():
    geometry = Geometry.create(96, 200)
    x, *rest = tensors(geometry, 0)
    y = merged_forward(x, *rest, geometry)
    assert y.shape == (0, 200)
    y.sum().backward()
    assert x.grad.shape == (0, 96)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [9, 300])
@pytest.mark.parametrize("shape", [(64, 64), (96, 96), (128, 512), (130, 70)], ids=str)
def test_half_precision_is_no_worse_than_the_reference(shape, tokens, dtype):
    geometry = Geometry.create(*shape)
    exact = tensors(geometry, tokens)
    low = [p.detach().to(dtype) for p in exact]
    # what both have to compute: the exact product of the rounded numbers
    target = by_reference(*(p.double() for p in low), geometry)
    own_error = relative(by_reference(*low, geometry).double(), target)
    assert relative(merged_forward(*low, geometry).double(), target) < 2 * own_error + 1e-6


def test_single_precision_is_exact_to_rounding():
    geometry = Geometry.create(1024, 1024)
    inputs = [p.detach() for p in tensors(geometry, 200)]
    single = [p.float() for p in inputs]
    own_error = relative(by_reference(*single, geometry).double(), by_reference(*(p.double() for p in single), geometry))
    found = relative(merged_forward(*single, geometry).double(), by_reference(*(p.double() for p in single), geometry))
    assert found < 2 * own_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(96, 96), (66, 132)], ids=str)
def test_gradients_in_half_precision_are_about_as_exact_in_many_chunks_as_in_one(shape, dtype, monkeypatch):
    geometry, tokens = Geometry.create(*shape), 2048
    low = [p.detach().to(dtype).requires_grad_() for p in tensors(geometry, tokens)]
    grad = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    _, exact, *_ = gradients(by_reference, [p.detach().double().requires_grad_() for p in low], geometry, grad.double())
    errors = {}
    for chunk in (8, tokens):
        monkeypatch.setattr(merged, "CHUNK_TOKENS", chunk)
        _, weight_grad, *_ = gradients(merged_forward, low, geometry, grad)
        errors[chunk] = relative(weight_grad.double(), exact)
    # every chunk's own gradient is rounded, which adds a little; a sum rounded at every chunk has five times the error
    assert errors[8] < 1.5 * errors[tokens]


@pytest.mark.parametrize("wanted", ["input", "blocks"])
def test_without_gradients_no_chunk_has_a_graph(wanted, monkeypatch):
    geometry = Geometry.create(128, 512)
    x, *parameters, bias = (p.detach() for p in tensors(geometry, 3 * merged.CHUNK_TOKENS))
    blocks = merge_stages(*parameters, merge_plan(geometry))
    for tensor in [x] if wanted == "input" else blocks:
        tensor.requires_grad_()
    graphs, mix = [], merged._mix

    def watched(*arguments):
        h = mix(*arguments)
        graphs.append(h.requires_grad)
        return h

    monkeypatch.setattr(merged, "_mix", watched)
    expected = apply_blocks(x, blocks, bias, merge_plan(geometry))
    assert graphs == [True] * 3
    graphs.clear()
    with torch.no_grad():
        y = apply_blocks(x, blocks, bias, merge_plan(geometry))
    assert graphs == [False] * 3
    assert not y.requires_grad
    assert torch.equal(y, expected)


@pytest.mark.parametrize("tokens", [9, 300])
def test_second_backward_equals_the_first(tokens):
    geometry = Geometry.create(128, 512)
    inputs = tensors(geometry, tokens)
    y = merged_forward(*inputs, geometry)
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    second = torch.autograd.grad(y, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", [[0], [1], [4], [1, 2, 3]], ids=str)
def test_only_some_gradients(wanted):
    geometry = Geometry.create(96, 96)
    inputs = tensors(geometry, 300)
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index in wanted)
    grad = torch.randn(300, 96, dtype=torch.double)
    chosen = [inputs[index] for index in wanted]
    found = torch.autograd.grad(merged_forward(*inputs, geometry), chosen, grad)
    expected = torch.autograd.grad(by_reference(*inputs, geometry), chosen, grad)
    assert all(relative(a, b) < 1e-11 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(96, 96), (128, 512), (512, 128), (130, 70)], ids=str)
def test_every_output_is_written(shape, monkeypatch):
    geometry = Geometry.create(*shape)
    inputs = tensors(geometry, 300)
    expected = gradients(by_reference, inputs, geometry, torch.ones(300, shape[1], dtype=torch.double))

    def poisoned(original):
        def allocate(*arguments, **options):
            return original(*arguments, **options).fill_(float("nan"))

        return allocate

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    y = merged_forward(*inputs, geometry)
    assert y.isfinite().all()
    found = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert all(relative(a, b) < 1e-11 for a, b in zip(found, expected, strict=True))


def test_blocks_are_merged_in_single_precision():
    geometry = Geometry.create(96, 96)
    weight, scale_in, scale_out = random_parameters(geometry, dtype=torch.bfloat16)
    blocks = merge_stages(weight, scale_in, scale_out, merge_plan(geometry))
    assert {block.dtype for block in blocks} == {torch.float32}


def test_dense_plan_is_the_matrix():
    geometry = Geometry.create(20, 33)
    parameters = random_parameters(geometry)
    (matrix,) = merge_stages(*parameters, merge_plan(geometry))
    identity = torch.eye(20, dtype=torch.double)
    torch.testing.assert_close(matrix.t(), reference_forward(identity, *parameters, geometry))
    torch.testing.assert_close(apply_blocks(identity, [matrix], None, merge_plan(geometry)), matrix.t())


@pytest.mark.parametrize(
    "shape", [(256, 256), (128, 512), (512, 128), (96, 200), (200, 96), (130, 70), (768, 192)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 5, CHUNK_TOKENS, CHUNK_TOKENS + 1])
@pytest.mark.parametrize("design", [{}, {"stages": 3}, {"block": 2}, {"rank": 3}], ids=str)
def test_chunks_that_are_written_in_place_are_the_reference(shape, tokens, design):
    torch.manual_seed(0)
    layer = SPMLinear(*shape, **design).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(tokens, shape[0])
        expected = torch.nn.functional.linear(x.double(), layer.double().to_dense(), layer.held_bias)
        layer.float()
        for rows in (x, x.t().contiguous().t(), x[:, None].expand(-1, 2, -1)):
            wanted = expected if rows.dim() == 2 else expected[:, None].expand(-1, 2, -1)
            assert relative(layer(rows).double(), wanted) < 1e-6


def test_one_pass_of_single_coordinates_is_written_by_two_products():
    plans = {shape: merge_plan(Geometry.create(*shape)) for shape in ((256, 256), (128, 512), (512, 128), (96, 200))}
    assert [plan.one_pass for plan in plans.values()] == [True, True, True, False]
    assert not merge_plan(Geometry.create(256, 256, 3)).one_pass
    assert not merge_plan(Geometry.create(256, 256, None, "general", 2)).one_pass
