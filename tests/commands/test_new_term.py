"""A kind of term that is a class, its module and a line in the registry goes through every command."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

import spmconvert
from spmconvert.checkpoint.converted import open_converted
from spmconvert.operator import design as designs
from spmconvert.operator.terms import registry
from spmconvert.operator.terms.module import LeastSquares, TermModule
from spmconvert.operator.terms.term import Term
from spmconvert.recipe import recipe as recipes
from tests.support import QUICK, SHORT, raw_tensors

LAYER = "transformer.h.0.mlp.c_fc"


@dataclass(frozen=True)
class Repeated(Term):
    """One number per output, on the input that comes round after ``stride`` outputs."""

    kind: ClassVar[str] = "repeated"

    stride: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no stride."""
        self.require("stride", 1)

    def parameter_count(self) -> int:
        """The numbers."""
        return self.out_features

    def flops_per_token(self) -> int:
        """A multiplication each."""
        return 2 * self.out_features

    def describe(self) -> str:
        """For example ``repeated by 3``."""
        return f"repeated by {self.stride}"

    def build(self, *, backend: Any = "auto", device: Any = None, dtype: torch.dtype | None = None) -> "RepeatedModule":
        """The module."""
        return RepeatedModule(self, device=device, dtype=dtype)

    @classmethod
    def designs(cls, in_features: int, out_features: int, parameters: int) -> list[Self]:
        """One."""
        return [cls(in_features, out_features)] if out_features <= parameters else []


class RepeatedModule(TermModule):
    """The numbers."""

    term: Repeated

    def __init__(self, term: Repeated, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(term)
        self.factors = nn.Parameter(torch.empty(term.out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones."""
        with torch.no_grad():
            self.factors.fill_(1.0)

    def places(self) -> Tensor:
        """The input of every output."""
        return torch.arange(self.term.out_features, device=self.factors.device) // self.term.stride % self.term.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Take inputs and multiply."""
        return x[:, self.places()] * self.factors.to(x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """The same as a product."""
        selected = torch.eye(self.term.in_features, dtype=x.dtype, device=x.device)[self.places()]
        return x @ (selected * self.factors.to(x.dtype)[:, None]).t()

    def scale_parameter(self) -> nn.Parameter:
        """The numbers."""
        return self.factors

    def start_(self, problem: LeastSquares, seed: int) -> None:
        """The matrix's own numbers."""
        with torch.no_grad():
            self.factors.copy_(problem.weight.gather(1, self.places()[:, None])[:, 0])


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Have the kind in a copy of the registry, before low rank, which comes last."""
    kinds = {"repeated": f"{__name__}:Repeated", **registry.KINDS}
    for module in (registry, designs, recipes):
        monkeypatch.setattr(module, "KINDS", kinds)


@pytest.mark.parametrize(
    "terms",
    [
        [{"kind": "repeated", "stride": 3}],
        [{"kind": "repeated"}, {"kind": "lowrank", "rank": 2}],
        [{"kind": "sparse24"}, {"kind": "repeated"}, {"kind": "spm", "stages": 2}],
    ],
    ids=lambda terms: "+".join(term["kind"] for term in terms),
)
def test_a_new_kind_of_term_goes_through_every_command(checkpoints, text, other_text, tmp_path, terms):
    changes = {"design.terms": terms, "allow_growth": True, **QUICK}
    converted = spmconvert.convert(checkpoints["gpt2"], tmp_path / "spm", calib=text, **changes)
    assert all(0 < record.error < 1 for record in converted.layers)
    stored = open_converted(tmp_path / "spm").layers[LAYER].design
    assert {"kind": "repeated", "stride": terms[0].get("stride", 1)} in stored.to_json()

    model = spmconvert.load(tmp_path / "spm").eval()
    layer = model.get_submodule(LAYER)
    x = torch.randn(5, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.to_dense().t() + layer.held_bias)
    model.save_pretrained(tmp_path / "again")
    before = raw_tensors(tmp_path / "spm")
    assert raw_tensors(tmp_path / "again") == before

    tuned = spmconvert.finetune(tmp_path / "spm", tmp_path / "ft", data=text, **{**SHORT, "steps": 2})
    assert tuned.steps == 2
    after = raw_tensors(tmp_path / "ft")
    assert after.keys() == before.keys()
    assert after[f"{LAYER}.repeated.factors"] != before[f"{LAYER}.repeated.factors"]

    report = spmconvert.report(tmp_path / "ft", data=other_text, rows=4, seconds=0)
    parameters = next(q for q in report.quantities if (q.what, q.scope) == ("parameters", "replaced layers"))
    layers = open_converted(tmp_path / "ft").layers.values()
    assert parameters.converted == sum(spec.parameter_count() for spec in layers)
    assert parameters.converted == sum(record.parameters for record in converted.layers)
    assert {row.design for row in report.layers} == {stored.describe()}

    exported = spmconvert.export(tmp_path / "ft", tmp_path / "dense")
    assert exported.difference <= exported.tolerance
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_budget_tries_a_new_kind_of_term(checkpoints, text, tmp_path):
    options = {"structures": "repeated,lowrank", "keep": 0.5, "allow_slower": True, "budget.iterations": 2}
    result = spmconvert.convert(checkpoints["gpt2"], tmp_path / "o", calib=text, **QUICK, **options)
    assert result.choice.cost <= result.choice.limit
    measured = [path.read_text() for path in Path(os.environ["SPMCONVERT_CACHE"]).rglob("*.json")]
    assert any('"repeated"' in content for content in measured), "it was tried"
    kinds = {term.kind for spec in open_converted(tmp_path / "o").layers.values() for term in spec.design.terms}
    assert kinds <= {"repeated", "lowrank"}
