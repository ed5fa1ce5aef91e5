"""The reference against an explicit dense matrix, and its closed-form backward against finite differences."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from spmconvert.operator.geometry import Geometry, stage_exponent, stage_period
from spmconvert.operator.reference import apply_stages, expand, fold, partner_index, reference_forward
from tests.operator.dense import operator_matrix, random_parameters, stage_matrix

DESIGNS = [("general", 1), ("rotation", 1), ("general", 3)]
SHAPES = [(1, 1), (1, 5), (2, 2), (3, 3), (5, 2), (7, 13), (12, 12), (13, 7), (16, 16), (24, 9), (9, 24), (67, 70)]


@pytest.mark.parametrize(("variant", "block"), DESIGNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stages", [None, 0, 1, 9])
def test_equals_the_dense_matrix(shape, variant, block, stages):
    geometry = Geometry.create(*shape, stages, variant, block)
    weight, scale_in, scale_out = random_parameters(geometry)
    x = torch.randn(4, shape[0], dtype=torch.double)
    expected = x @ operator_matrix(weight, scale_in, scale_out, geometry).t()
    torch.testing.assert_close(
        reference_forward(x, weight, scale_in, scale_out, geometry), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("variant", "block"), DESIGNS)
@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (7, 12)], ids=str)
def test_first_and_second_derivatives(shape, variant, block):
    geometry = Geometry.create(*shape, 4, variant, block)
    inputs = [p.requires_grad_() for p in (torch.randn(2, shape[0], dtype=torch.double), *random_parameters(geometry))]

    def run(*tensors):
        return reference_forward(*tensors, geometry)

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("width", [2, 6, 13, 24])
def test_rotations_keep_the_norm(width):
    geometry = Geometry.create(width, width, 7, "rotation")
    weight, _, _ = random_parameters(geometry)
    x = torch.randn(5, width, dtype=torch.double)
    ones = torch.ones(width, dtype=torch.double)
    torch.testing.assert_close(reference_forward(x, weight, ones, ones, geometry).norm(dim=1), x.norm(dim=1))


@pytest.mark.parametrize(("variant", "block"), DESIGNS)
def test_apply_stages_runs_a_range(variant, block):
    geometry = Geometry.create(12, 12, 6, variant, block)
    weight, _, _ = random_parameters(geometry)
    x = torch.randn(12, 3, dtype=torch.double)
    expected = x
    for stage in (2, 3, 4):
        expected = stage_matrix(weight, stage, geometry.blocks, block, variant) @ expected
    found = apply_stages(x.view(geometry.blocks, block, 3), weight, geometry, 2, 3)
    torch.testing.assert_close(found.reshape(12, 3), expected)


def test_expand_and_fold_are_transposes():
    x, y = torch.randn(2, 5, dtype=torch.double), torch.randn(2, 13, dtype=torch.double)
    torch.testing.assert_close((expand(x, 13) * y).sum(), (x * fold(y, 5)).sum())


def test_unpaired_mixers_have_no_effect_and_no_gradient():
    geometry = Geometry.create(3, 3, 2)
    weight, scale_in, scale_out = random_parameters(geometry)
    weight.requires_grad_()
    x = torch.randn(4, 3, dtype=torch.double)
    reference_forward(x, weight, scale_in, scale_out, geometry).sum().backward()
    # block 2 has no partner at stride 1, block 1 none at stride 2
    assert weight.grad[0, 1, 2] == 0
    assert weight.grad[1, 1, 1] == 0
    assert (weight.grad != 0).sum() == weight.numel() - 2


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 12, 25, 64, 100])
def test_partners_are_symmetric_and_differ_in_one_bit(blocks):
    own = torch.arange(blocks)
    for stage in range(2 * stage_period(blocks)):
        index, paired = partner_index(stage, blocks, own.device)
        stride = 1 << stage_exponent(stage, blocks)
        assert torch.equal(index[index], own)
        assert torch.equal(paired, (own ^ stride) < blocks)
        assert ((index ^ own)[paired] == stride).all()
        assert torch.equal(index[~paired], own[~paired])
