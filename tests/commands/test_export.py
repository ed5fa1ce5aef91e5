"""A dense export loads without spmconvert and computes what the converted checkpoint computes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from spmconvert.commands import export as exporting
from spmconvert.commands.convert import convert
from spmconvert.commands.export import export
from spmconvert.errors import FitError, OptionError, OutputError, UnsupportedLayerError
from spmconvert.model.loading import load
from tests.conftest import _save

QUICK = {"fit.iterations": 2, "calibration.rows": 16, "calibration.tokens": 32}
ALONE = """
import sys, torch, transformers
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], dtype="auto").eval()
with torch.no_grad():
    logits = model(torch.arange(3, 23)[None])[0].float()
assert "spmconvert" not in sys.modules
torch.save(logits, sys.argv[3])
"""


def outputs_without_spmconvert(directory, architecture, file):
    command = [sys.executable, "-c", ALONE, str(directory), architecture, str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return torch.load(file)


@pytest.mark.parametrize(("name", "architecture"), [("gpt2", "GPT2LMHeadModel"), ("bert", "BertModel")])
def test_export_loads_without_spmconvert_and_matches(checkpoints, text, tmp_path, name, architecture):
    convert(checkpoints[name], tmp_path / "spm", calib=text, rank=2, **QUICK)
    result = export(tmp_path / "spm", tmp_path / "dense")
    found = outputs_without_spmconvert(result.output, architecture, tmp_path / "logits.pt")
    with torch.no_grad():
        expected = load(tmp_path / "spm").eval()(torch.arange(3, 23)[None])[0]
    assert (found - expected).abs().max() <= result.tolerance * expected.abs().max()
    assert result.difference <= result.tolerance
    source, dense = load_file(checkpoints[name] / "model.safetensors"), load_file(result.output / "model.safetensors")
    assert {key: value.shape for key, value in dense.items()} == {key: value.shape for key, value in source.items()}
    assert result.bytes == sum(value.nbytes for value in dense.values())
    assert "quantization_config" not in json.loads((result.output / "config.json").read_text())
    assert not (result.output / "spm.json").exists()
    assert (result.output / "tokenizer.json").exists()


def test_biases_of_the_conversion_turn_on_the_switch_of_the_architecture(checkpoints, text, tmp_path):
    # only some of the layers that the switch reaches are converted
    convert(checkpoints["llama"], tmp_path / "spm", targets="up_proj", calib=text, **QUICK)
    result = export(tmp_path / "spm", tmp_path / "dense")
    assert result.added_biases == ("mlp_bias",)
    assert json.loads((result.output / "config.json").read_text())["mlp_bias"] is True
    tensors = load_file(result.output / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.bias"].abs().max() > 0
    assert tensors["model.layers.0.mlp.down_proj.bias"].abs().max() == 0
    found = outputs_without_spmconvert(result.output, "LlamaForCausalLM", tmp_path / "logits.pt")
    with torch.no_grad():
        expected = load(tmp_path / "spm").eval()(torch.arange(3, 23)[None]).logits
    assert (found - expected).abs().max() <= result.tolerance * expected.abs().max()


def test_half_precision_is_kept(checkpoints, tmp_path):
    convert(checkpoints["llama-bf16"], tmp_path / "spm", **{"fit.iterations": 2})
    result = export(tmp_path / "spm", tmp_path / "dense")
    model, information = LlamaForCausalLM.from_pretrained(result.output, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert result.added_biases == ()
    assert not any(information.values())


def test_a_bias_without_a_place_is_refused(text, tmp_path):
    config = T5Config(
        vocab_size=96, d_model=32, d_kv=16, d_ff=96, num_layers=1, num_heads=2, decoder_start_token_id=1, pad_token_id=1
    )
    torch.manual_seed(0)
    source = _save(T5ForConditionalGeneration(config), tmp_path / "t5")
    convert(source, tmp_path / "spm", calib=text, **QUICK)
    with pytest.raises(UnsupportedLayerError, match="got a bias from calibration"):
        export(tmp_path / "spm", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_an_export_that_differs_does_not_appear(checkpoints, tmp_path, monkeypatch):
    convert(checkpoints["gpt2"], tmp_path / "spm", **{"fit.iterations": 1})
    layer = exporting._dense_layer

    def wrong(*arguments):
        (name, size, matrix), *rest = layer(*arguments)
        return [(name, size, lambda: matrix() * 1.5), *rest]

    monkeypatch.setattr(exporting, "_dense_layer", wrong)
    with pytest.raises(FitError, match="differs from"):
        export(tmp_path / "spm", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_wrong_requests_are_refused(checkpoints, tmp_path):
    convert(checkpoints["gpt2"], tmp_path / "spm", **{"fit.iterations": 1})
    with pytest.raises(OptionError, match="format is 'onnx'"):
        export(tmp_path / "spm", tmp_path / "dense", form="onnx")
    with pytest.raises(OptionError, match="is the input"):
        export(tmp_path / "spm", tmp_path / "spm", force=True)
    (tmp_path / "dense").mkdir()
    with pytest.raises(OutputError, match="--force"):
        export(tmp_path / "spm", tmp_path / "dense")
