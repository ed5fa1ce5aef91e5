"""Widths, groups, pairings and counts: integers, checked over many sizes."""

import pytest

from spmconvert.errors import OptionError
from spmconvert.operator.geometry import Geometry, merge_groups, padded_width, stage_exponent, stage_period

WIDTHS = [*range(1, 140), 200, 384, 768, 769, 1000, 1536, 2048, 5632, 8192, 8200, 11008, 14336, 28672, 100003]


@pytest.mark.parametrize(
    ("largest", "width"), [(1, 1), (13, 13), (64, 64), (768, 768), (1024, 1024), (3072, 3072), (11008, 11264)]
)
def test_widths_of_the_design(largest, width):
    assert padded_width(largest) == width


@pytest.mark.parametrize("block", [1, 2, 3, 16])
def test_padding_is_small_and_a_multiple_of_the_block(block):
    for largest in WIDTHS:
        width = padded_width(largest, block)
        assert largest <= width
        assert width % block == 0
        assert width <= 1.15 * largest + block


@pytest.mark.parametrize("stages", [0, 1, 3, 6, 11, 17, 40])
def test_groups_cover_all_stages_in_order_and_act_where_the_pairs_are(stages):
    for largest in WIDTHS:
        blocks = padded_width(largest)
        following = 0
        for group in merge_groups(blocks, stages):
            assert group.first_stage == following
            following += group.stages
            assert group.outer * group.middle * group.inner == blocks
            for stage in range(group.first_stage, following):
                stride = 1 << stage_exponent(stage, blocks)
                assert stride % group.inner == 0, "a stage of the group moves below its digit"
                last = stride // group.inner
                assert last < max(2, group.middle), "a stage of the group moves above its digit"
        assert following == stages


def test_large_groups_stay_small():
    for largest in WIDTHS:
        blocks = padded_width(largest)
        assert all(group.middle <= 128 for group in merge_groups(blocks, stage_period(blocks)))


def test_parameter_counts():
    assert Geometry.create(64, 64, 6).parameter_count() == 2 * 64 * (6 + 1)
    assert Geometry.create(64, 64, 6, "rotation").parameter_count() == 64 * 6 // 2 + 2 * 64
    assert Geometry.create(64, 48, 6).parameter_count() == 2 * 64 * 7
    assert Geometry.create(64, 64, 4, block=4).parameter_count() == 2 * 64 * 4 * 4 + 2 * 64


def test_default_stages_are_one_pass():
    assert Geometry.create(768, 3072).stages == 12
    assert Geometry.create(768, 768).stages == 10
    assert Geometry.create(64, 64, block=4).stages == 4


def test_flops_are_those_of_the_blocks():
    assert Geometry.create(1024, 1024).flops_per_token() == 2 * 1024 * (32 + 32)
    assert Geometry.create(64, 48).flops_per_token() == 2 * 64 * 48
    # one stage of wide blocks is no dense matrix, and no stage at all is a diagonal
    assert Geometry.create(256, 256, 1, block=16).flops_per_token() == 2 * 256 * 2 * 16
    assert Geometry.create(64, 48, 0).flops_per_token() == 2 * 64


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 4, 4, 1),
        (4, 0, 4, 1),
        (4, 4, 3, 1),
        (4, 4, 4, -1),
        (4, 4, 4, 1, "skew"),
        (4, 4, 4, 1, "rotation", 2),
        (4, 4, 5, 1, "general", 2),
        (4, 4, 4, 1, "general", 0),
        (4, 4, 4, 1.5),
        (4, 4, 4, True),
    ],
)
def test_what_no_layer_can_have(arguments):
    with pytest.raises(OptionError):
        Geometry(*arguments)
