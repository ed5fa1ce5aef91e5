"""A kind of term that the tool has never heard of: registered, built, fitted, described, read back, tried by a budget."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import spmconvert
from spmconvert.budget.candidates import designs_of, standing_designs_of
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.errors import OptionError
from spmconvert.operator import design as design_module
from spmconvert.operator.design import Design
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms import registry
from spmconvert.operator.terms.lowrank import LowRank
from spmconvert.operator.terms.module import TermModule
from spmconvert.operator.terms.spm import Stages
from spmconvert.operator.terms.term import Term


@dataclass(frozen=True)
class Shifted(Term):
    """y_i = scale_i x_(i + shift), a generalised diagonal; solved where ``solved``, by a gradient otherwise."""

    kind: ClassVar[str] = "shifted"

    shift: int = 0
    solved: bool = False

    def __post_init__(self):
        self.require("shift", 0)

    @property
    def columns(self):
        return [(row + self.shift) % self.in_features for row in range(self.out_features)]

    @property
    def closed_form(self):
        return self.solved

    def parameter_count(self):
        return self.out_features

    def flops_per_token(self):
        return self.out_features

    def describe(self):
        return f"a diagonal shifted by {self.shift}"

    def build(self, *, backend="auto", device=None, dtype=None):
        return ShiftedModule(self, device, dtype)

    @classmethod
    def designs(cls, in_features, out_features, parameters):
        return [cls(in_features, out_features, 1)] if out_features <= parameters else []

    @classmethod
    def standing_designs(cls, in_features, out_features):
        return [cls(in_features, out_features, 2)]


class ShiftedModule(TermModule):
    """The scales, [out_features]."""

    def __init__(self, term, device, dtype):
        super().__init__(term)
        self.scale = nn.Parameter(torch.empty(term.out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            self.scale.normal_()

    def forward(self, x):
        return x[:, self.term.columns] * self.scale.to(x.dtype)

    reference = forward

    def scale_parameter(self):
        return self.scale

    def start_(self, problem, seed):
        with torch.no_grad():
            self.scale.copy_(torch.randn(self.scale.shape, generator=torch.Generator().manual_seed(seed)))

    @torch.no_grad()
    def solve_(self, problem):
        target, rows = problem.root @ problem.weight.t(), problem.root[:, self.term.columns]
        self.scale.copy_((target * rows).sum(0) / rows.square().sum(0))


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    """The kinds there are, with one more in front of low rank."""
    known = dict(registry.KINDS)
    low_rank = known.pop("lowrank")
    known |= {"shifted": f"{__name__}:Shifted", "lowrank": low_rank}
    monkeypatch.setattr(registry, "KINDS", known)
    monkeypatch.setattr(design_module, "KINDS", known)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator) + 1.0


def test_it_is_found_described_and_read_back():
    design = Design(24, 40, (LowRank(24, 40, 3), Shifted(24, 40, 5)))
    assert registry.term_class("shifted") is Shifted
    assert design.describe() == "a diagonal shifted by 5 + rank 3"
    entries = json.loads(json.dumps(design.to_json()))
    assert entries[0] == {"kind": "shifted", "shift": 5, "solved": False}
    assert Design.from_json(24, 40, entries) == design
    assert Design.from_options(24, 40, [{"kind": "shifted"}]).terms == (Shifted(24, 40),)
    with pytest.raises(OptionError, match="shift of a shifted term is -1"):
        Design.from_options(24, 40, [{"kind": "shifted", "shift": -1}])
    with pytest.raises(OptionError, match=r"choose among spm, .*, shifted, lowrank"):
        registry.term_class("butterfly")


@pytest.mark.parametrize("tokens", [3, 500])
@pytest.mark.parametrize("others", [(), (LowRank(24, 40, 3),), (Stages(24, 40, 40, 3), LowRank(24, 40, 3))], ids=len)
def test_a_layer_adds_it_up(others, tokens):
    torch.manual_seed(0)
    layer = SPMLinear(24, 40, terms=[Shifted(24, 40, 5), *others], dtype=torch.double)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    assert sum(parameter.numel() for parameter in layer.parameters()) == layer.design.parameter_count(bias=True)
    x = torch.randn(tokens, 24, dtype=torch.double)
    expected = torch.nn.functional.linear(x, layer.to_dense(), layer.held_bias)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    for row, column in enumerate(layer.shifted.term.columns):
        assert layer.shifted.matrix()[row, column] == layer.shifted.scale[row]


@pytest.mark.parametrize("statistics", [None, "inputs"])
@pytest.mark.parametrize("solved", [False, True])
def test_what_it_can_be_is_recovered(solved, statistics):
    torch.manual_seed(0)
    dense = nn.Linear(24, 40)
    with torch.no_grad():
        planted = SPMLinear(24, 40, terms=[Shifted(24, 40, 5)]).to_dense()
        dense.weight.copy_(planted)
    given = None if statistics is None else ActivationStatistics.of(inputs())
    layer, result = spmconvert.fit_linear(dense, given, terms=[Shifted(24, 40, 5, solved)], iterations=200)
    assert result.end < 1e-6
    torch.testing.assert_close(layer.to_dense(), planted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("solved", [False, True])
def test_beside_low_rank_both_are_found(solved):
    torch.manual_seed(0)
    dense = nn.Linear(24, 40)
    with torch.no_grad():
        parts = SPMLinear(24, 40, terms=[Shifted(24, 40, 5)]).to_dense(), torch.randn(40, 3) @ torch.randn(3, 24)
        dense.weight.copy_(sum(parts))
    statistics = ActivationStatistics.of(inputs())
    ends = [
        spmconvert.fit_linear(dense, statistics, terms=terms, iterations=300)[1].end
        for terms in ([LowRank(24, 40, 3)], [Shifted(24, 40, 5, solved), LowRank(24, 40, 3)])
    ]
    assert ends[1] < 0.2 * ends[0]


@pytest.mark.parametrize("solved", [False, True])
def test_three_terms_are_never_worse_than_the_zero_matrix_and_have_the_error_they_say(solved):
    torch.manual_seed(0)
    dense = nn.Linear(24, 40)
    statistics = ActivationStatistics.of(inputs())
    terms = [Stages(24, 40, 40, 3), Shifted(24, 40, 5, solved), LowRank(24, 40, 3)]
    layer, result = spmconvert.fit_linear(dense, statistics, terms=terms, iterations=40)
    missed = dense.weight - layer.to_dense()
    covariance = statistics.covariance
    left, whole = ((m @ covariance * m).sum().item() for m in (missed, dense.weight))
    assert result.end <= result.start <= 1 + 1e-6
    x = inputs()
    torch.testing.assert_close(layer(x).mean(0), dense(x).mean(0), rtol=1e-3, atol=1e-3)
    assert left / whole == pytest.approx(result.end, rel=1e-2)


def test_a_budget_tries_it_alone_and_beside_low_rank():
    def words(designs):
        return [design.describe() for design in designs]

    # its size is its own: alone it is tried as it is, and low rank gets what a budget leaves
    assert designs_of("shifted", 24, 40, 200, beside_low_rank=False) == []
    assert words(designs_of("shifted", 24, 40, 200, beside_low_rank=True)) == ["a diagonal shifted by 2 + rank 2"]
    assert designs_of("shifted", 24, 40, 39, beside_low_rank=True) == []
    assert words(standing_designs_of("shifted", 24, 40)) == ["a diagonal shifted by 2"]
