"""The kind of term that CONTRIBUTING.md shows goes through the whole tool: one file and one line of the registry."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import spmconvert
from spmconvert.operator.terms import registry

CONTRIBUTING = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
SQUARE = {"targets": "*attn.c_proj", "calibration.rows": 12}


@pytest.fixture
def diagonal(tmp_path, monkeypatch):
    """The worked example as a module that the registry knows."""
    (source,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)
    (tmp_path / "shown_term.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "KINDS", {"diagonal": "shown_term:Diagonal", **registry.KINDS})
    monkeypatch.setattr("spmconvert.operator.design.KINDS", registry.KINDS)
    monkeypatch.setattr("spmconvert.recipe.recipe.KINDS", registry.KINDS)
    yield
    sys.modules.pop("shown_term", None)


def test_the_example_converts_by_hand_and_under_a_budget(diagonal, checkpoints, text, tmp_path, cache):
    by_hand = {"design.terms": [{"kind": "diagonal"}, {"kind": "lowrank", "rank": 3}]}
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "hand", calib=text, **SQUARE, **by_hand)
    model = spmconvert.load(tmp_path / "hand").eval()
    layer = model.transformer.h[0].attn.c_proj
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.to_dense(), layer.held_bias))
    assert layer.to_dense().diagonal().abs().sum() > 0
    spmconvert.finetune(tmp_path / "hand", tmp_path / "tuned", data=text, steps=2, batch_size=4, block_size=16)
    tuned = spmconvert.load(tmp_path / "tuned").transformer.h[0].attn.c_proj
    assert not torch.equal(tuned.diagonal.factors, layer.diagonal.factors)
    spmconvert.export(tmp_path / "hand", tmp_path / "dense")
    dense = spmconvert.load(tmp_path / "dense").transformer.h[0].attn.c_proj
    torch.testing.assert_close(dense.weight.t(), layer.to_dense(), rtol=1e-4, atol=1e-5)
    budget = {"keep": 0.4, "allow_slower": True, "structures": "diagonal,lowrank"}
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "budget", calib=text, **SQUARE, **budget)
    layers = json.loads((tmp_path / "budget" / "config.json").read_text())["quantization_config"]["layers"]
    assert all(term["kind"] in ("diagonal", "lowrank") for entry in layers.values() for term in entry["terms"])


def test_without_its_line_the_checkpoint_is_refused(diagonal, checkpoints, tmp_path, monkeypatch):
    spmconvert.convert(
        checkpoints["gpt2"], tmp_path / "out", targets="*attn.c_proj", **{"design.terms": [{"kind": "diagonal"}]}
    )
    monkeypatch.undo()
    with pytest.raises(spmconvert.errors.CheckpointError, match="there is no kind of term 'diagonal'"):
        spmconvert.load(tmp_path / "out")
