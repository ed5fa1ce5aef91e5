"""How transformers treats a converted checkpoint: every known trap of loading, training and saving is a test here."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import load_file, save_file
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    QuantoConfig,
    TorchAoConfig,
    pipeline,
)
from transformers.pytorch_utils import Conv1D

import spmconvert
from spmconvert.checkpoint import reader
from spmconvert.checkpoint.reader import open_loaded, tokenizer_place
from spmconvert.commands.in_memory import convert_in_memory_
from spmconvert.errors import CheckpointError, CorruptCheckpointError, OptionError, RecipeError
from spmconvert.hf import SPMConfig
from spmconvert.model.swap import copy_sharing_tensors, replace_module, swap_layers
from tests.conftest import SUMS
from tests.support import raw_tensors


def logits(model):
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        return model.eval()(input_ids=ids)[0]


def spm_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, spmconvert.SPMLinear)}


REGISTERED = """
import importlib, os, sys
import torch, transformers
assert "transformers.quantizers.auto" not in sys.modules
for order in (("spmconvert", "transformers.quantizers.auto"), ("transformers.quantizers.auto", "spmconvert")):
    if os.fork() == 0:
        for name in order:
            importlib.import_module(name)
        table = sys.modules["transformers.quantizers.auto"].AUTO_QUANTIZER_MAPPING
        registered = "spm" in table
        importlib.reload(importlib.import_module("spmconvert.hf"))
        os._exit(not (registered and "spm" in table))
    assert os.wait()[1] == 0, order
"""


def test_registration_is_idempotent_and_order_does_not_matter():
    done = subprocess.run([sys.executable, "-c", REGISTERED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LOADED = """
import json, sys, warnings
warnings.simplefilter("ignore")
from transformers import AutoModel
errors = []
for directory in sys.argv[1:]:
    for ignored in (False, True):
        try:
            AutoModel.from_pretrained(directory, ignore_mismatched_sizes=ignored)
            errors.append("")
        except Exception as error:
            errors.append(str(error))
assert "spmconvert" not in sys.modules
print(json.dumps(errors))
"""


def test_loading_without_the_import_raises(converted, sums, tmp_path):
    directories = []
    checkpoints = [converted[name] for name in ("gpt2", "llama", "bert")]
    # low rank alone is two ordinary layers, and yet it must not load as a dense one
    checkpoints += [sums[name] for name in ("lowrank", "sparse24", "mixed")]
    for checkpoint in checkpoints:
        stripped = tmp_path / checkpoint.name / checkpoint.parent.name
        shutil.copytree(checkpoint, stripped)
        config = json.loads((stripped / "config.json").read_text())
        del config["quantization_config"], config["transformers_weights"]
        (stripped / "config.json").write_text(json.dumps(config))
        directories += [checkpoint, stripped]
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *map(str, directories)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    for directory, error, ignoring in zip(directories, errors[::2], errors[1::2], strict=True):
        if directory in checkpoints:
            # with mismatches ignored, too, and the remedy is what it ends with
            assert error.endswith("import spmconvert before this checkpoint is loaded"), directory
            assert ignoring == error
        else:
            assert "size mismatch" in error or "mismatched" in error or "ignore_mismatched_sizes" in error, directory


def test_the_guard_is_off_with_the_import_and_in_what_is_dense(converted, tmp_path):
    assert "transformers_weights" in json.loads((converted["gpt2"] / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(converted["gpt2"])
    assert "transformers_weights" not in model.config
    AutoModelForSequenceClassification.from_pretrained(converted["gpt2"], num_labels=5, ignore_mismatched_sizes=True)
    result = spmconvert.export(converted["gpt2"], tmp_path / "dense")
    assert "transformers_weights" not in json.loads((result.output / "config.json").read_text())


def test_a_weight_file_that_a_config_names_is_that(converted, tmp_path):
    shutil.copytree(converted["gpt2"], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "other.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    torch.testing.assert_close(logits(spmconvert.load(tmp_path / "m")), logits(spmconvert.load(converted["gpt2"])))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_from_config_and_load_checkpoint_and_dispatch(converted, tmp_path, name):
    config = AutoConfig.from_pretrained(converted[name])
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    whole = spmconvert.load(converted[name])
    assert spmconvert.swap_(model) == list(spm_layers(whole))
    model.tie_weights()
    model = load_checkpoint_and_dispatch(model, converted[name], device_map={"": "cpu"})
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=0)
    # one with memory has fresh layers and is saved as converted
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(converted[name]))
    spmconvert.swap_(fresh)
    fresh.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(spmconvert.load(tmp_path)), logits(fresh), rtol=0, atol=0)


def test_only_a_converted_config_puts_layers_in(checkpoints):
    dense = AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"])
    with pytest.raises(OptionError, match="no layer map"):
        spmconvert.swap_(dense)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "llama-bf16", "bert"])
def test_weights_survive_load_save_load(converted, tmp_path, name):
    first = spmconvert.load(converted[name])
    assert spm_layers(first)
    first.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    second = spmconvert.load(tmp_path / "again")
    assert spm_layers(second).keys() == spm_layers(first).keys()
    torch.testing.assert_close(logits(second), logits(first), rtol=0, atol=0)
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@pytest.mark.parametrize("name", SUMS)
def test_every_kind_of_term_survives_load_save_load(sums, tmp_path, name):
    first = spmconvert.load(sums[name])
    first.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    maps = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (sums[name], tmp_path / "again")]
    assert maps[0] == maps[1]
    assert {key: found for key, (_, found) in raw_tensors(tmp_path / "again").items()} == {
        key: found for key, (_, found) in raw_tensors(sums[name]).items()
    }
    second = spmconvert.load(tmp_path / "again")
    assert [layer.design for layer in spm_layers(second).values()] == [layer.design for layer in spm_layers(first).values()]
    torch.testing.assert_close(logits(second), logits(first), rtol=0, atol=0)


STORED = {
    "lowrank": {"weight", "lowrank.down.weight", "lowrank.up.weight", "lowrank.up.bias"},
    "sparse24": {"weight", "sparse24.values", "sparse24.positions", "bias"},
    "spm+lowrank": {
        "weight",
        "spm.weight",
        "spm.scale_in",
        "spm.scale_out",
        "lowrank.down.weight",
        "lowrank.up.weight",
        "lowrank.up.bias",
    },
}


@pytest.mark.parametrize("name", STORED)
def test_stored_tensors_are_the_mark_the_terms_and_the_bias(sums, name):
    prefix = "model.layers.0.mlp.up_proj."
    tensors = load_file(sums[name] / "model.safetensors")
    found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    assert found.keys() == STORED[name]
    assert found["weight"].shape == (1, 1, 1)
    assert found["weight"].item() == 0
    assert {part for part, tensor in found.items() if not tensor.is_floating_point()} <= {"sparse24.positions"}
    if name == "sparse24":
        assert found["sparse24.positions"].dtype == torch.uint8


def test_stored_config_is_plain_json_and_saved_again_unchanged(converted, tmp_path):
    model = spmconvert.load(converted["gpt2"])
    model.save_pretrained(tmp_path)
    before, after = (
        json.loads((d / "config.json").read_text())["quantization_config"] for d in (converted["gpt2"], tmp_path)
    )
    assert before == after
    assert before["quant_method"] == "spm"
    assert before["format_version"] == 2
    assert before["layers"]["transformer.h.0.mlp.c_fc"] == {
        "in": 32,
        "out": 128,
        "terms": [{"kind": "spm", "width": 128, "stages": 7, "variant": "general", "block": 1}],
        "bias": True,
        "fan_in_fan_out": True,
        "dtype": None,
    }


def test_gpt2_initialisation_finds_weight(converted):
    # its _init_weights touches mlp.c_proj.weight of every block by name
    assert isinstance(spmconvert.load(converted["gpt2"]).transformer.h[0].mlp.c_proj, spmconvert.SPMLinear)


def test_layers_have_no_buffers_but_the_mark_and_no_meta_tensors(converted):
    for module in spm_layers(spmconvert.load(converted["bert"])).values():
        assert {name: tuple(buffer.shape) for name, buffer in module.named_buffers()} == {"weight": (1, 1, 1)}
        assert all(tensor.device.type == "cpu" for tensor in module.state_dict().values())


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_missing_or_misshapen_tensor_raises(converted, tmp_path, damage):
    directory = tmp_path / "copy"
    shutil.copytree(converted["bert"], directory)
    tensors = load_file(directory / "model.safetensors")
    key = next(name for name in tensors if name.endswith("intermediate.dense.spm.scale_in"))
    if damage == "missing":
        del tensors[key]
    else:
        tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CorruptCheckpointError, RuntimeError), match=r"missing from the checkpoint|mismatch"):
        AutoModel.from_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("lowrank", "lowrank.up.weight"),
        ("lowrank", "lowrank.up.bias"),
        ("lowrank", "weight"),
        ("sparse24", "sparse24.positions"),
        ("sparse24", "sparse24.values"),
        ("wrapped", "sparse24.before.scale_in"),
    ],
)
def test_missing_tensor_of_a_term_raises(sums, tmp_path, name, part):
    directory = tmp_path / "copy"
    shutil.copytree(sums[name], directory)
    tensors = load_file(directory / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match=rf"layers\.1\.mlp\.up_proj\.{part} .*missing from the checkpoint"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_positions_of_another_shape_raise(sums, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(sums["sparse24"], directory)
    tensors = load_file(directory / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.sparse24.positions"
    tensors[key] = tensors[key][:, :-1].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CorruptCheckpointError, RuntimeError), match=r"missing from the checkpoint|mismatch"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_base_model_and_other_heads(converted):
    base = AutoModel.from_pretrained(converted["gpt2"])
    head = AutoModelForSequenceClassification.from_pretrained(converted["gpt2"], num_labels=2)
    full = AutoModelForCausalLM.from_pretrained(converted["gpt2"])
    for model in (base, head):
        names = [name.removeprefix("transformer.") for name in spm_layers(model)]
        assert names == [name.removeprefix("transformer.") for name in spm_layers(full)]
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = full.eval().transformer(ids)[0]
        torch.testing.assert_close(base.eval()(ids)[0], expected, rtol=0, atol=0)


def test_other_head_on_a_base_checkpoint(converted):
    # the map of a BertModel has no "bert." in its names, a model with a head has
    head = AutoModelForSequenceClassification.from_pretrained(converted["bert"], num_labels=2)
    assert any(name.startswith("bert.encoder") for name in spm_layers(head))


def test_model_without_any_converted_layer_is_refused(converted):
    with pytest.raises(CheckpointError, match="none of the"):
        swap_layers(
            torch.nn.Sequential(),
            SPMConfig(**json.loads((converted["bert"] / "config.json").read_text())["quantization_config"]).specs(),
        )


def test_half_float_and_to_work(converted):
    model = spmconvert.load(converted["gpt2"])
    reference = logits(model)
    assert logits(model.bfloat16()).dtype == torch.bfloat16
    assert logits(model.half().float()).dtype == torch.float32
    assert (logits(model) - reference).norm() / reference.norm() < 0.02


@pytest.mark.parametrize("name", ["lowrank", "sparse24", "mixed"])
def test_half_precision_of_every_kind_of_term(sums, name):
    model = spmconvert.load(sums[name])
    reference = logits(model)
    half = AutoModelForCausalLM.from_pretrained(sums[name], dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} <= {torch.bfloat16, torch.uint8}
    assert (logits(half) - reference).norm() / reference.norm() < 0.02


def test_dtype_at_load(converted):
    model = AutoModelForCausalLM.from_pretrained(converted["gpt2"], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in spmconvert.load(converted["llama-bf16"]).parameters()} == {torch.bfloat16}


def test_pinned_dtype_stays_inside_a_half_precision_model(checkpoints, text, tmp_path):
    spmconvert.convert(
        checkpoints["llama-bf16"], tmp_path / "o", targets="mlp", dtype="float32", calib=text, **{"fit.iterations": 2}
    )
    for options in ({}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}):
        model = spmconvert.load(tmp_path / "o", **options)
        assert all(p.dtype == torch.float32 for layer in spm_layers(model).values() for p in layer.parameters())
        assert model.lm_head.weight.dtype != torch.float32
        assert logits(model).isfinite().all()


def test_trainer_trains_and_saves(converted, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = spmconvert.load(converted["gpt2"])
    before = {name: layer.spm.weight.detach().clone() for name, layer in spm_layers(model).items()}
    rows = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)} for _ in range(4)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    after = spmconvert.load(tmp_path / "trained")
    for name, layer in spm_layers(after).items():
        assert not torch.equal(layer.spm.weight, before[name]), name


@pytest.mark.parametrize(
    "config",
    [
        QuantoConfig(weights="int8"),
        BitsAndBytesConfig(load_in_8bit=True),
        FineGrainedFP8Config(),
        TorchAoConfig(Int8WeightOnlyConfig()),
        SPMConfig(targets="attn"),
        {"quant_method": "torchao"},
    ],
    ids=lambda config: type(config).__name__,
)
def test_another_config_at_load_is_refused(converted, config):
    with pytest.raises(ValueError, match=f"SPMCheckpointConfig but you are passing a {type(config).__name__}"):
        AutoModelForCausalLM.from_pretrained(converted["gpt2"], quantization_config=config)


def test_tensor_parallel_plan_drops_replaced_layers(converted):
    model = spmconvert.load(converted["llama"])
    plan = {"model.layers.*.mlp.gate_proj": "colwise", "model.layers.*.self_attn.q_proj": "colwise"}
    model.hf_quantizer.update_parallel_plan(model, plan)
    assert list(plan) == ["model.layers.*.self_attn.q_proj"]
    model._tp_size = 2
    with pytest.raises(CheckpointError, match="tensor parallelism"):
        model.hf_quantizer.update_parallel_plan(model, {"model.layers.*.mlp.gate_proj": "colwise"})


def test_quantizer_claims(converted):
    quantizer = spmconvert.load(converted["llama"]).hf_quantizer
    assert quantizer.is_trainable
    assert quantizer.is_qat_trainable
    assert quantizer.is_serializable()
    assert quantizer.is_compileable


def test_parameter_names_are_safe_from_legacy_renames(converted):
    names = {
        part for layer in spm_layers(spmconvert.load(converted["bert"])).values() for part, _ in layer.named_parameters()
    }
    assert names == {"spm.weight", "spm.scale_in", "spm.scale_out", "bias"}
    assert not any("gamma" in name or "beta" in name for name in names)


def test_pipeline_and_generate(converted):
    generator = pipeline("text-generation", model=str(converted["gpt2"]), device="cpu")
    result = generator("the rain", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert len(result) > 0
    assert spm_layers(generator.model)


def test_tokenizer_and_generation_config_load(converted):
    assert AutoTokenizer.from_pretrained(converted["gpt2"])("abc")["input_ids"]
    assert spmconvert.load(converted["gpt2"]).generation_config.eos_token_id == 2


def test_device_map(converted):
    model = AutoModelForCausalLM.from_pretrained(converted["llama"], device_map="auto")
    assert spm_layers(model)
    torch.testing.assert_close(logits(model), logits(spmconvert.load(converted["llama"])), rtol=0, atol=0)


def test_layers_on_disk_are_complete(converted, tmp_path):
    whole = spmconvert.load(converted["llama"])
    blocks = range(whole.config.num_hidden_layers)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    # the only block with converted layers is one of those on disk
    places |= {f"model.layers.{index}": "cpu" if index == 1 else "disk" for index in blocks}
    model = AutoModelForCausalLM.from_pretrained(converted["llama"], device_map=places, offload_folder=tmp_path)
    assert all(parameter.is_meta for layer in spm_layers(model).values() for parameter in layer.parameters())
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=0)


@pytest.mark.parametrize("name", SUMS)
def test_terms_on_disk_are_complete_and_run(sums, tmp_path, name):
    whole = spmconvert.load(sums[name])
    if name == "mixed":
        kinds = {tuple(term.kind for term in layer.design.terms) for layer in spm_layers(whole).values()}
        assert kinds == {("lowrank",), ("sparse24",), ("spm",)}
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{index}": "disk" for index in range(whole.config.num_hidden_layers)}
    model = AutoModelForCausalLM.from_pretrained(sums[name], device_map=places, offload_folder=tmp_path)
    for _ in range(2):
        assert all(parameter.is_meta for layer in spm_layers(model).values() for parameter in layer.parameters())
        torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=0)
    # gradients reach what is before the layers
    inputs = torch.randn(1, 8, 32, requires_grad=True)
    slopes = [torch.autograd.grad(own(inputs_embeds=inputs)[0].sum(), inputs)[0] for own in (whole, model)]
    torch.testing.assert_close(*slopes)


def test_convert_on_load_equals_the_command(checkpoints, text, tmp_path, converted):
    request = SPMConfig(targets="mlp", calib=str(text), **{"calibration.rows": 24, "fit.iterations": 20})
    model = AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"], quantization_config=request)
    torch.testing.assert_close(logits(model), logits(spmconvert.load(converted["gpt2"])), rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(spmconvert.load(tmp_path)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"subfolder": "inner"}, {"variant": "other"}], ids=str)
def test_convert_on_load_takes_the_files_that_are_loaded(checkpoints, text, tmp_path, options):
    shutil.copytree(checkpoints["gpt2"], tmp_path / "m")
    if "subfolder" in options:
        # another model of another size lies around it
        shutil.copytree(checkpoints["llama"], tmp_path / "n")
        shutil.move(tmp_path / "m", tmp_path / "n" / "inner")
        (tmp_path / "n").rename(tmp_path / "m")
        weights = tmp_path / "m" / "inner" / "model.safetensors"
    else:
        weights = tmp_path / "m" / "model.safetensors"
    tensors = {name: 2 * tensor if "mlp" in name else tensor for name, tensor in load_file(weights).items()}
    target = weights.with_name("model.other.safetensors") if "variant" in options else weights
    weights.unlink()
    save_file(tensors, target, {"format": "pt"})
    quick = {"calibration.rows": 24, "fit.iterations": 2, "allow_growth": True}
    request = SPMConfig(targets="mlp", calib=str(text), rank=30, **quick)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=request, **options)
    weight = tensors["transformer.h.0.mlp.c_fc.weight"].t()
    found = model.transformer.h[0].mlp.c_fc.to_dense()
    assert (found - weight).square().sum() < 0.1 * weight.square().sum()


def test_a_fit_is_made_in_float32_whatever_the_default_is(checkpoints, text, tmp_path):
    request = {"targets": "mlp", "calib": str(text), "rank": 4, "calibration.rows": 24, "fit.iterations": 10}
    matrices = []
    for default in (torch.float32, torch.bfloat16):
        model = spmconvert.load(checkpoints["llama"])
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            convert_in_memory_(model, [checkpoints["llama"] / "model.safetensors"], SPMConfig(**request).recipe())
        finally:
            torch.set_default_dtype(before)
        matrices.append(torch.stack([layer.to_dense() for name, layer in spm_layers(model).items() if "up_proj" in name]))
    assert matrices[1].dtype == torch.float32
    torch.testing.assert_close(matrices[0], matrices[1], rtol=0, atol=0)


def test_the_commit_of_a_file_in_the_cache_of_the_hub(checkpoints, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    shutil.copytree(checkpoints["gpt2"], snapshot / "inner", ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
    source = open_loaded("owner/name", [snapshot / "inner" / "model.safetensors"])
    assert (source.name, source.revision) == ("owner/name", "0123abc")
    fetched = []
    monkeypatch.setattr(reader, "_download", lambda *given: fetched.append(given) or snapshot)
    assert tokenizer_place(source) == snapshot
    assert fetched == [("owner/name", "0123abc")]
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*only safetensors"):
        open_loaded("owner/name", [snapshot / "pytorch_model.bin"])
    with pytest.raises(CheckpointError, match="a state dict"):
        open_loaded("", [])


@pytest.mark.parametrize("name", ["lowrank", "sparse24"])
def test_convert_on_load_of_every_kind_of_term(checkpoints, text, sums, tmp_path, name):
    request = SPMConfig(targets="mlp", calib=str(text), new_bias=True, **{"calibration.rows": 24, **SUMS[name]})
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], quantization_config=request)
    torch.testing.assert_close(logits(model), logits(spmconvert.load(sums[name])), rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(spmconvert.load(tmp_path)), logits(model), rtol=0, atol=0)


def test_convert_on_load_without_data(checkpoints):
    request = SPMConfig(targets="attn", stages=2, **{"fit.iterations": 2})
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], quantization_config=request)
    assert all("self_attn" in name for name in spm_layers(model))


def test_config_errors():
    with pytest.raises(RecipeError, match="unknown key"):
        SPMConfig(stagez=3)
    with pytest.raises(OptionError, match="both given"):
        SPMConfig(layers={}, targets="mlp")
    with pytest.raises(OptionError, match="quant_method"):
        SPMConfig(quant_method="gptq")
    with pytest.raises(CheckpointError, match="format_version 99"):
        SPMConfig(layers={}, format_version=99)
    with pytest.raises(CheckpointError, match=r"format_version 1, .*convert its source again"):
        SPMConfig(layers={}, format_version=1)
    with pytest.raises(CheckpointError, match="needs"):
        SPMConfig(layers={"a": {"in": 3}})
    assert SPMConfig(targets="mlp").to_dict()["layers"] is None


def test_a_copy_shares_tensors_but_not_modules(checkpoints):
    model = spmconvert.load(checkpoints["gpt2"])
    copied = copy_sharing_tensors(model)
    name = "transformer.h.0.mlp.c_fc"
    replace_module(copied, name, torch.nn.Identity())
    assert isinstance(model.get_submodule(name), Conv1D)
    for key, parameter in copied.named_parameters():
        assert parameter is model.get_parameter(key)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_dequantize_gives_the_dense_model(converted, tmp_path, name):
    """In memory, and saved as a checkpoint that needs no spmconvert; under another head, too."""
    model = AutoModel.from_pretrained(converted[name])
    expected = model(torch.arange(3, 19)[None])[0]
    dense = model.dequantize()
    assert dense is model
    assert not spm_layers(dense)
    torch.testing.assert_close(dense(torch.arange(3, 19)[None])[0], expected, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(torch.arange(3, 19)[None])[0], expected, rtol=1e-4, atol=1e-5)
