"""Graphs of a converted model run by themselves, on any number of rows and tokens, and compute the same."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from spmconvert.checkpoint.converted import open_converted
from spmconvert.commands.convert import convert
from spmconvert.commands.export import export
from spmconvert.errors import BackendError, FitError, UnsupportedLayerError
from spmconvert.exporting import frozen, graph
from spmconvert.exporting.frozen import freeze_
from spmconvert.model.loading import load
from spmconvert.operator.linear import SPMLinear
from tests.commands.sentences import sentence_directory

QUICK = {"fit.iterations": 2, "fit.refine": 0}
IDS = torch.arange(3, 24).view(3, 7)


def run_onnx(directory, ids):
    """Outputs by name."""
    session = onnxruntime.InferenceSession(directory / "model.onnx")
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    found = session.run(names, {name: value.numpy() for name, value in given.items() if name in wanted})
    return dict(zip(names, found, strict=True))


def expected(directory, ids):
    """The first output of the converted model."""
    with torch.no_grad():
        return load(directory).eval()(ids)[0].numpy()


def close(found, wanted):
    return np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.slow
def test_onnx_of_a_causal_model(gpt2_spm, tmp_path):
    result = export(gpt2_spm, tmp_path / "onnx", form="onnx")
    assert close(run_onnx(tmp_path / "onnx", IDS)["logits"], expected(gpt2_spm, IDS))
    assert close(run_onnx(tmp_path / "onnx", IDS[:1, :5])["logits"], expected(gpt2_spm, IDS[:1, :5]))
    assert 0 <= result.difference <= 1e-5
    assert result.compared == "logits on 2x16, 3x7, 1x11 by onnxruntime"
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
    }
    assert "quantization_config" not in json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert (tmp_path / "onnx" / "tokenizer.json").is_file()


def test_onnx_of_a_sentence_encoder_has_pooling_and_normalisation(checkpoints, tmp_path):
    source = sentence_directory(checkpoints["bert"], tmp_path / "sentences")
    convert(source, tmp_path / "spm", targets="mlp", stages=3, rank=4, **QUICK)
    result = export(tmp_path / "spm", tmp_path / "onnx", form="onnx")
    found = run_onnx(tmp_path / "onnx", IDS)
    states = expected(tmp_path / "spm", IDS)
    pooled = states.mean(1)
    assert close(found["last_hidden_state"], states)
    assert close(found["sentence_embedding"], pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    assert "sentence_embedding" in result.compared


def test_a_program_of_torch_runs_by_itself(converted, tmp_path):
    result = export(converted["bert"], tmp_path / "torch", form="torch")
    code = """
import sys, torch
ids = torch.arange(3, 24).view(3, 7)
program = torch.export.load(sys.argv[1]).module()
found = program(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
torch.save(found["last_hidden_state"].detach(), sys.argv[2])
assert "spmconvert" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-I", "-c", code, result.output / "model.pt2", tmp_path / "o.pt"], check=True)
    assert close(torch.load(tmp_path / "o.pt").numpy(), expected(converted["bert"], IDS))
    assert 0 <= result.difference <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lowrank", "sparse24", "wrapped", "spm+lowrank", "sparse24+lowrank", "mixed"])
@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_graphs_of_every_kind_of_term(sums, tmp_path, name, form):
    result = export(sums[name], tmp_path / form, form=form)
    assert 0 <= result.difference <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "wav2vec2", "whisper"])
def test_onnx_of_models_of_pictures_and_sounds(checkpoints, tmp_path, name):
    convert(checkpoints[name], tmp_path / "spm", targets="mlp", stages=0, rank=4, **QUICK)
    result = export(tmp_path / "spm", tmp_path / "onnx", form="onnx")
    assert 0 <= result.difference <= result.tolerance


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_frozen_layers_compute_the_same(converted, name):
    model = load(converted[name]).eval()
    with torch.no_grad():
        before = model(IDS)[0]
        after = freeze_(model)(IDS)[0]
    assert not any(isinstance(module, SPMLinear) for module in model.modules())
    assert close(after.numpy(), before.numpy())


def test_one_that_differs_is_refused(gpt2_spm, monkeypatch):
    merged = frozen._merged
    monkeypatch.setattr(frozen, "_merged", lambda term: merged(term).requires_grad_(False).apply(spoil))
    recorded = graph.Recorded.of(open_converted(gpt2_spm), torch.float32)
    with pytest.raises(FitError, match=r"logits of 2 x 16 by hand"):
        recorded.compare(lambda batch: recorded.model(**batch), "hand")
    with pytest.raises(FitError, match=r"does not run on 2 x 16 by hand: 'logits'"):
        recorded.compare(lambda batch: {}["logits"], "hand")


def spoil(module):
    for buffer in module.buffers(recurse=False):
        buffer.mul_(1.01)


def test_what_a_graph_cannot_hold_is_refused(checkpoints, tmp_path, monkeypatch):
    source = sentence_directory(checkpoints["bert"], tmp_path / "s", pooling_mode_mean_tokens=True, include_prompt=False)
    convert(source, tmp_path / "spm", targets="mlp", stages=0, rank=4, **QUICK)
    with pytest.raises(UnsupportedLayerError, match="include_prompt"):
        export(tmp_path / "spm", tmp_path / "onnx", form="onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"onnxruntime is not installed; pip install 'spmconvert\[onnx\]'"):
        export(tmp_path / "spm", tmp_path / "onnx", form="onnx")
    assert not (tmp_path / "onnx").exists()
