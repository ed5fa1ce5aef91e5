"""Designs in integers: words, sizes, JSON and back, what recipes may leave out, and refusals."""

import json
import subprocess
import sys

import pytest

from spmconvert.errors import OptionError
from spmconvert.operator.design import Design, staged_design
from spmconvert.operator.geometry import Geometry
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.registry import term_from_json, term_from_options
from spmconvert.operator.terms.sparse24 import Sparse24
from spmconvert.operator.terms.spm import Stages

SIZES = (64, 48)
STAGES, LOW_RANK, SPARSE = Stages.of(Geometry.create(*SIZES, 5, block=2)), LowRank(*SIZES, 3), Sparse24(*SIZES)
DESIGNS = [
    Design(*SIZES, terms)
    for terms in ((STAGES,), (LOW_RANK,), (SPARSE,), (STAGES, LOW_RANK), (SPARSE, LOW_RANK), (STAGES, SPARSE, LOW_RANK))
]


def test_designs_in_words():
    words = {
        (5, "general", 2, 3): "5 stages, general, block 2 + rank 3",
        (4, "rotation", 1, 0): "4 stages, rotation",
        (1, "general", 4, 0): "1 stage, general, block 4",
        (0, "general", 1, 3): "rank 3",
        (0, "general", 1, 0): "a diagonal",
    }
    for numbers, expected in words.items():
        assert staged_design(*SIZES, *numbers).describe() == expected


def test_sizes_are_those_of_the_terms():
    assert staged_design(*SIZES, 6, rank=3).parameter_count(bias=True) == 2 * 64 * 7 + 3 * (64 + 48) + 48
    assert staged_design(*SIZES, 0, rank=3).parameter_count(bias=False) == 3 * (64 + 48)
    assert staged_design(*SIZES, 0, rank=3).flops_per_token() == 2 * 3 * (64 + 48)
    assert staged_design(*SIZES, 6, rank=3).flops_per_token() == 2 * 64 * 48 + 2 * 3 * (64 + 48)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("design", DESIGNS, ids=Design.describe)
def test_sizes_are_those_of_the_layer(design, bias):
    layer = SPMLinear(*SIZES, bias, terms=design.terms)
    assert sum(parameter.numel() for parameter in layer.parameters()) == design.parameter_count(bias=bias)
    state = layer.state_dict().values()
    assert sum(tensor.nbytes for tensor in state) == design.stored_bytes(4, bias=bias)
    assert sum(tensor.nbytes for tensor in layer.half().state_dict().values()) == design.stored_bytes(2, bias=bias)
    assert dict(layer.named_parameters()).keys() >= ({design.bias_name} if bias else set())


@pytest.mark.parametrize("design", DESIGNS, ids=Design.describe)
def test_json_and_back(design):
    entries = json.loads(json.dumps(design.to_json()))
    assert Design.from_json(*SIZES, entries) == design
    assert Design.from_json(*SIZES, entries[::-1]) == design, "in whatever order"
    assert Design.from_options(*SIZES, entries) == design


def test_the_order_is_that_of_the_kinds_and_low_rank_comes_last():
    design = Design(*SIZES, (LOW_RANK, SPARSE, STAGES))
    assert [term.kind for term in design.terms] == ["spm", "sparse24", "lowrank"]
    assert design.term("lowrank") == LOW_RANK
    assert design.term("monarch") is None


def test_what_runs_how():
    assert [design.only_low_rank for design in DESIGNS] == [False, True, False, False, False, False]
    assert [design.is_iterative for design in DESIGNS] == [True, False, False, True, False, True]
    assert [design.runs_dense for design in DESIGNS] == [False, False, True, False, True, True]


def test_recipes_may_leave_out_what_has_a_default():
    assert term_from_options(*SIZES, {"kind": "spm"}) == Stages.of(Geometry.create(*SIZES))
    assert term_from_options(*SIZES, {"kind": "spm", "stages": 5, "block": 2}) == STAGES
    assert term_from_options(*SIZES, STAGES.to_json()) == STAGES
    assert term_from_options(*SIZES, {"kind": "lowrank"}) == LowRank(*SIZES, 1)
    assert Design.from_options(*SIZES, [{"kind": "spm"}, {"kind": "lowrank", "rank": 2}]) == staged_design(*SIZES, rank=2)


@pytest.mark.parametrize("terms", [(), (LOW_RANK, LowRank(*SIZES, 2))], ids=["none", "two of a kind"])
def test_sums_that_no_layer_can_be(terms):
    with pytest.raises(OptionError, match="at least one, and at most one of a kind"):
        Design(*SIZES, terms)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("lowrank", "need a list of tables"),
        ({"kind": "lowrank", "rank": 3}, "need a list of tables"),
        (["lowrank"], "a table with a kind"),
        ([{"rank": 3}], "a table with a kind"),
        ([{"kind": 3}], "a table with a kind"),
        ([{"kind": "butterfly"}], "no kind of term 'butterfly'; choose among spm, "),
        ([{"kind": "lowrank"}], r"has \[\]; it needs \['rank'\]"),
        ([{"kind": "lowrank", "rank": 3, "alpha": 1}], r"has \['alpha', 'rank'\]"),
        ([{"kind": "lowrank", "rank": 0}], "rank of a lowrank term is 0; it must be an integer of at least 1"),
        ([{"kind": "lowrank", "rank": True}], "rank of a lowrank term is True"),
        ([{"kind": "lowrank", "rank": "3"}], "rank of a lowrank term is '3'"),
        ([{"kind": "lowrank", "rank": 49}], "at most min"),
        ([{"kind": "spm", "stages": 5, "variant": "general", "block": 1}], "it needs"),
        ([{"kind": "spm", "width": 48, "stages": 5, "variant": "general", "block": 1}], "width is 48"),
        ([{"kind": "spm", "width": 64, "stages": -1, "variant": "general", "block": 1}], "stages is -1"),
        ([], "at least one"),
    ],
    ids=str,
)
def test_json_that_is_no_design(entries, message):
    with pytest.raises(OptionError, match=message):
        Design.from_json(*SIZES, entries)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "spm", "rank": 2}, r"a spm term has \['rank'\]"),
        ({"kind": "lowrank", "stages": 2}, r"a lowrank term has \['stages'\]"),
        ({"stages": 2}, "a table with a kind"),
    ],
)
def test_options_that_are_unknown(entry, message):
    with pytest.raises(OptionError, match=message):
        term_from_options(*SIZES, entry)


def test_a_term_reads_itself_back_without_the_sizes():
    assert STAGES.to_json() == {"kind": "spm", "width": 64, "stages": 5, "variant": "general", "block": 2}
    assert LOW_RANK.to_json() == {"kind": "lowrank", "rank": 3}
    for term in (STAGES, LOW_RANK, SPARSE):
        assert term_from_json(*SIZES, term.to_json()) == term


def test_designs_are_checked_before_torch_is_imported():
    code = """
import sys
import spmconvert.operator.design, spmconvert.recipe.recipe
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
