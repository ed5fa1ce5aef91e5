"""A dense export loads without spmconvert and computes what the converted checkpoint computes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from spmconvert.checkpoint.converted import open_converted
from spmconvert.commands.convert import convert
from spmconvert.commands.export import export
from spmconvert.commands.verify import verify
from spmconvert.errors import FitError, OptionError, OutputError, UnsupportedLayerError
from spmconvert.exporting import dense as exporting
from spmconvert.hf import SPMConfig
from spmconvert.model.loading import load
from tests.conftest import SUMS, _save

QUICK = {"fit.iterations": 2, "calibration.rows": 16, "calibration.tokens": 32}
ALONE = """
import json, sys, torch, transformers
for directory, architecture in json.loads(sys.argv[1]):
    model = getattr(transformers, architecture).from_pretrained(directory, dtype="auto").eval()
    with torch.no_grad():
        outputs = model(torch.arange(3, 23)[None])[0].float()
    torch.save(outputs, f"{directory}/outputs.pt")
assert "spmconvert" not in sys.modules
"""
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "bert": "BertModel", "llama": "LlamaForCausalLM"}
# of the Llama only some of the layers are converted that its switch of biases reaches
CHANGES = {"gpt2": {"rank": 2}, "bert": {"rank": 2}, "llama": {"targets": "up_proj", "new_bias": True}}


def exported(checkpoints, text, place, name):
    """A converted checkpoint and its export."""
    convert(checkpoints[name], place / f"{name}-spm", calib=text, **QUICK, **CHANGES[name])
    return place / f"{name}-spm", export(place / f"{name}-spm", place / f"{name}-dense")


def test_exports_load_without_spmconvert_and_match(checkpoints, text, tmp_path):
    exports = {name: exported(checkpoints, text, tmp_path, name) for name in ARCHITECTURES}
    asked = [[str(result.output), ARCHITECTURES[name]] for name, (_, result) in exports.items()]
    subprocess.run([sys.executable, "-c", ALONE, json.dumps(asked)], check=True, capture_output=True)
    for directory, result in exports.values():
        found = torch.load(result.output / "outputs.pt")
        with torch.no_grad():
            expected = load(directory).eval()(torch.arange(3, 23)[None])[0]
        assert (found - expected).abs().max() <= result.tolerance * expected.abs().max()
        assert 0 <= result.difference <= result.tolerance


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_an_export_is_a_dense_checkpoint_like_the_source(checkpoints, text, tmp_path, name):
    _, result = exported(checkpoints, text, tmp_path, name)
    source, dense = load_file(checkpoints[name] / "model.safetensors"), load_file(result.output / "model.safetensors")
    assert {key: value.shape for key, value in dense.items()} == {key: value.shape for key, value in source.items()}
    assert result.bytes == sum(value.nbytes for value in dense.values())
    assert "quantization_config" not in json.loads((result.output / "config.json").read_text())
    assert not (result.output / "spm.json").exists()
    assert (result.output / "tokenizer.json").exists()


def test_biases_of_the_conversion_turn_on_the_switch_of_the_architecture(checkpoints, text, tmp_path):
    _, result = exported(checkpoints, text, tmp_path, "llama")
    assert result.added_biases == ("mlp_bias",)
    assert json.loads((result.output / "config.json").read_text())["mlp_bias"] is True
    tensors = load_file(result.output / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.bias"].abs().max() > 0
    assert tensors["model.layers.0.mlp.down_proj.bias"].abs().max() == 0


@pytest.mark.parametrize("name", SUMS)
def test_every_kind_of_term_is_exported(sums, tmp_path, name):
    result = export(sums[name], tmp_path / "dense")
    assert 0 <= result.difference <= result.tolerance
    converted = load(sums[name]).eval()
    dense = LlamaForCausalLM.from_pretrained(result.output).eval()
    for key in open_converted(sums[name]).layers:
        layer, own = converted.get_submodule(key), dense.get_submodule(key)
        assert torch.equal(own.weight, layer.to_dense())
        assert torch.equal(own.bias, layer.held_bias)
    with torch.no_grad():
        found, expected = (model(torch.arange(3, 23)[None])[0] for model in (dense, converted))
    assert (found - expected).abs().max() <= result.tolerance * expected.abs().max()
    stored = load_file(result.output / "model.safetensors")
    assert all(value.is_floating_point() and value.ndim < 3 for value in stored.values())
    assert result.bytes == sum(value.nbytes for value in stored.values())


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
    convert(source, tmp_path / "spm", calib=text, new_bias=True, **QUICK)
    with pytest.raises(UnsupportedLayerError, match="got a new bias"):
        export(tmp_path / "spm", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("refine", [0, 1])
def test_a_calibrated_decoder_without_biases_is_exported(checkpoints, text, tmp_path, refine):
    """As itself, since no layer gets a bias that the dense one has not, fits in sequence and refinement included."""
    options = {"calib": text, **QUICK, "refine": refine, "rank": 2, "sequential": True}
    convert(checkpoints["llama"], tmp_path / "spm", **options)
    result = export(tmp_path / "spm", tmp_path / "dense")
    assert result.added_biases == ()
    source = load_file(checkpoints["llama"] / "model.safetensors")
    assert load_file(result.output / "model.safetensors").keys() == source.keys()


def test_an_export_that_differs_does_not_appear(checkpoints, tmp_path, monkeypatch):
    convert(checkpoints["gpt2"], tmp_path / "spm", **{"fit.iterations": 1})
    layer = exporting._dense_layers

    def wrong(*arguments):
        (name, size, matrix), *rest = layer(*arguments)
        return [(name, size, lambda: matrix() * 1.5), *rest]

    monkeypatch.setattr(exporting, "_dense_layers", wrong)
    with pytest.raises(FitError, match="differs from"):
        export(tmp_path / "spm", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_wrong_requests_are_refused(checkpoints, tmp_path):
    convert(checkpoints["gpt2"], tmp_path / "spm", **{"fit.iterations": 1})
    with pytest.raises(OptionError, match="format is 'gguf'"):
        export(tmp_path / "spm", tmp_path / "dense", form="gguf")
    with pytest.raises(OptionError, match="is the input"):
        export(tmp_path / "spm", tmp_path / "spm", force=True)
    (tmp_path / "dense").mkdir()
    with pytest.raises(OutputError, match="--force"):
        export(tmp_path / "spm", tmp_path / "dense")


@pytest.mark.parametrize("name", ["saved", "loaded"])
def test_what_other_programs_wrote_of_a_converted_model_is_exported(checkpoints, converted, tmp_path, name):
    """By ``save_pretrained``, of a conversion or of a model that was converted while it was loaded: without spm.json."""
    if name == "saved":
        load(converted["gpt2"]).save_pretrained(tmp_path / "o")
    else:
        request = SPMConfig(targets="mlp", stages=2, **{"fit.iterations": 2})
        AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"], quantization_config=request).save_pretrained(
            tmp_path / "o"
        )
    assert not (tmp_path / "o" / "spm.json").exists()
    assert not [check for check in verify(tmp_path / "o") if check.outcome == "FAILED"]
    result = export(tmp_path / "o", tmp_path / "dense")
    assert 0 <= result.difference <= result.tolerance
