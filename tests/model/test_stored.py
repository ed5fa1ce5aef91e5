"""Names of tensors that transformers gives other names while it loads: found, kept, and loaded again."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import spmconvert
from spmconvert.checkpoint.converted import open_converted
from spmconvert.data.tokens import padded_batch, reads_tokens
from spmconvert.errors import CorruptCheckpointError, UnsupportedLayerError
from spmconvert.model.architecture import load_config, skeleton
from spmconvert.model.opening import open_, opened_names
from spmconvert.model.stored import StoredNames, stored_prefixes
from spmconvert.model.swap import unstack_
from tests.conftest import VOCABULARY, _tokenizer
from tests.plan.architectures import ARCHITECTURES
from tests.support import QUICK, SHORT, raw_tensors

OLD, NEW = "vit.encoder.layer.0.intermediate.dense", "vit.layers.0.mlp.fc1"


@pytest.fixture
def names(checkpoints):
    tensors = load_file(checkpoints["vit"] / "model.safetensors")
    return StoredNames.of(skeleton(load_config(checkpoints["vit"])), tensors)


def test_names_are_found_whatever_the_file_calls_them(names):
    assert names.tensor(f"{NEW}.weight") == f"{OLD}.weight"
    # of the base model, which lacks the prefix
    assert names.tensor(f"{NEW}.weight".removeprefix("vit.")) == f"{OLD}.weight"
    assert names.tensor("vit.layers.0.mlp.fc7.weight") is None


def test_new_tensors_are_called_as_transformers_finds_them(names):
    parts = ("weight", "lowrank.up.weight")
    assert names.module(NEW, OLD, parts) == OLD
    # where the file's own name would lead elsewhere, the model's
    assert names.module(NEW, "vit.encoder.layer.1.intermediate.dense", parts) == NEW
    assert names.module("vit.encoder.layer.0.intermediate.dense", OLD, parts) is None


def test_old_and_new_layouts_give_the_same_bytes(checkpoints, tmp_path):
    (tmp_path / "new").mkdir()
    source = checkpoints["vit"]
    names = StoredNames.of(skeleton(load_config(source)), load_file(source / "model.safetensors"))
    renamed = {new: load_file(source / "model.safetensors")[old] for new, old in names.by_model.items()}
    assert f"{NEW}.weight" in renamed
    save_file(renamed, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "new" / "config.json").write_text((source / "config.json").read_text())
    for name, directory in (("old", source), ("new", tmp_path / "new")):
        spmconvert.convert(directory, tmp_path / f"{name}-spm", stages=0, rank=4)
    old, new = (raw_tensors(tmp_path / f"{name}-spm") for name in ("old", "new"))
    assert f"{OLD}.lowrank.up.weight" in old
    assert f"{NEW}.lowrank.up.weight" in new
    both = StoredNames.of(skeleton(load_config(source)), old).by_model
    assert {name: old[stored] for name, stored in both.items()} == new
    prefixes = stored_prefixes(open_converted(tmp_path / "old-spm"))
    assert prefixes[NEW] == OLD


def test_a_layer_that_is_gone(checkpoints, tmp_path):
    spmconvert.convert(checkpoints["vit"], tmp_path / "o", stages=0, rank=4)
    file = tmp_path / "o" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(OLD)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match="no tensors of it"):
        stored_prefixes(open_converted(tmp_path / "o"))


def test_a_weight_that_is_missing_or_merged_is_named(checkpoints, tmp_path):
    (tmp_path / "s").mkdir()
    tensors = load_file(checkpoints["vit"] / "model.safetensors")
    del tensors[f"{OLD}.weight"]
    save_file(tensors, tmp_path / "s" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "s" / "config.json").write_text((checkpoints["vit"] / "config.json").read_text())
    with pytest.raises(UnsupportedLayerError, match=f"{NEW}.weight is no tensor of the checkpoint"):
        spmconvert.convert(tmp_path / "s", tmp_path / "o")


# towers side by side and tokens of several streams cannot be run on a row of tokens, which the export is checked on
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "musicgen-decoder"])
def test_every_architecture_is_converted_loaded_and_exported(name, tmp_path):
    config, architecture, sizes = ARCHITECTURES[name]
    torch.manual_seed(0)
    dense = getattr(transformers, architecture)(getattr(transformers, config)(**sizes)).eval()
    dense.save_pretrained(tmp_path / "s")
    targets = "*proj" if name in ("mamba", "mixtral") else "mlp"
    conversion = spmconvert.convert(tmp_path / "s", tmp_path / "o", targets=targets, stages=0, rank=4)
    converted = spmconvert.load(tmp_path / "o")
    unstack_(converted)
    found = dict(converted.named_parameters())
    replaced = {name for name, module in converted.named_modules() if isinstance(module, spmconvert.SPMLinear)}
    assert len(replaced) == len(conversion.layers)
    open_(dense, opened_names(replaced))
    for key, tensor in dense.named_parameters():
        if key.rpartition(".")[0] not in replaced:
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
    assert not [check for check in spmconvert.verify(tmp_path / "o") if check.outcome == "FAILED"]
    spmconvert.export(tmp_path / "o", tmp_path / "e")
    whole = getattr(transformers, architecture).from_pretrained(tmp_path / "e")
    open_(whole, opened_names(replaced))
    for module in replaced:
        torch.testing.assert_close(whole.get_submodule(module).weight.shape, dense.get_submodule(module).weight.shape)


READERS = [name for name, (_, _, sizes) in ARCHITECTURES.items() if "vocab_size" in sizes and name != "musicgen-decoder"]


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_every_architecture_that_reads_is_run_and_finetuned(name, text, tmp_path):
    config, architecture, sizes = ARCHITECTURES[name]
    torch.manual_seed(0)
    sizes = {**sizes, "vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    dense = getattr(transformers, architecture)(getattr(transformers, config)(**sizes)).eval()
    dense.config.architectures = [architecture]
    if not reads_tokens(dense.config):
        pytest.skip(f"{architecture} reads no text")
    dense.save_pretrained(tmp_path / "s")
    tokenizer = _tokenizer()
    tokenizer.mask_token = "|"
    tokenizer.save_pretrained(tmp_path / "s")
    targets = "*proj" if name in ("mamba", "mixtral") else "mlp"
    spmconvert.convert(tmp_path / "s", tmp_path / "o", targets=targets, calib=text, stages=0, rank=4, **QUICK)
    model = spmconvert.load(tmp_path / "o").eval()
    batch = padded_batch([torch.arange(3, 15)], 1, model)
    with torch.no_grad():
        assert model(**batch)[0].isfinite().all()
    trained = spmconvert.finetune(tmp_path / "o", tmp_path / "t", data=text, **{**SHORT, "steps": 2})
    assert trained.steps == 2
    assert not [check for check in spmconvert.verify(tmp_path / "t") if check.outcome == "FAILED"]


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
# renamed inside of towers, fused in the file, or initialised by a parent that reaches for the layers' biases
FAMILIES = {
    "Dinov2Model": lambda: transformers.Dinov2Config(**VISION, patch_size=8, mlp_ratio=2),
    "ASTForAudioClassification": lambda: transformers.ASTConfig(
        **{key: value for key, value in VISION.items() if key != "image_size"}, max_length=64, num_mel_bins=16
    ),
    "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(**VISION, patch_size=8),
    "LlavaForConditionalGeneration": lambda: transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION, "patch_size": 8},
        image_token_index=63,
    ),
    "NomicBertModel": lambda: transformers.NomicBertConfig(**TEXT, pad_token_id=1),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_whose_tensors_are_renamed(name, tmp_path):
    torch.manual_seed(0)
    dense = getattr(transformers, name)(FAMILIES[name]()).eval()
    dense.save_pretrained(tmp_path / "s")
    conversion = spmconvert.convert(tmp_path / "s", tmp_path / "o", stages=0, rank=4)
    found = spmconvert.load(tmp_path / "o")
    assert sum(isinstance(module, spmconvert.SPMLinear) for module in found.modules()) == len(conversion.layers)
    assert not [check for check in spmconvert.verify(tmp_path / "o") if check.outcome == "FAILED"]
    # what transformers saves of it has the same names again
    found.save_pretrained(tmp_path / "again")
    assert raw_tensors(tmp_path / "again") == raw_tensors(tmp_path / "o")
