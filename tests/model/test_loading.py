"""A model is loaded with all tensors that it uses, or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import spmconvert
from spmconvert.errors import CheckpointError
from spmconvert.model.architecture import load_config
from spmconvert.model.loading import load_whole
from tests.support import QUICK, SHORT


def without(source, place, *parts):
    """A copy of a checkpoint that lacks tensors."""
    shutil.copytree(source, place)
    tensors = load_file(place / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}
    assert len(kept) < len(tensors)
    save_file(kept, place / "model.safetensors", metadata={"format": "pt"})
    return place


def test_a_missing_tensor_is_named(checkpoints, tmp_path):
    place = without(checkpoints["llama"], tmp_path / "a", "lm_head", "model.norm")
    with pytest.raises(CheckpointError, match=r"has no lm_head.weight and 1 more, which LlamaForCausalLM would draw"):
        load_whole(place, load_config(place))


def test_a_head_that_the_checkpoint_has_not_is_refused(checkpoints, text, tmp_path):
    place = shutil.copytree(checkpoints["bert"], tmp_path / "s")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(CheckpointError, match=r"cls\.predictions"):
        spmconvert.convert(place, tmp_path / "o", calib=text, **QUICK)


def test_a_pooler_is_missed_by_nothing_that_compares_states(checkpoints, text, tmp_path):
    """It is neither trained nor written then."""
    place = without(checkpoints["bert"], tmp_path / "s", "pooler")
    spmconvert.convert(place, tmp_path / "o", calib=text, **QUICK)
    tuned = spmconvert.finetune(tmp_path / "o", tmp_path / "ft", data=text, train="all", **SHORT)
    assert not any("pooler" in name for name in load_file(tuned.output / "model.safetensors"))


def test_a_tied_head_that_is_also_stored_is_trained_with_its_embedding(checkpoints, text, tmp_path):
    place = shutil.copytree(checkpoints["llama-tied"], tmp_path / "s")
    tensors = load_file(place / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    spmconvert.convert(place, tmp_path / "o", calib=text, **QUICK)
    spmconvert.finetune(tmp_path / "o", tmp_path / "ft", data=text, train="all", learning_rate=0.01, **SHORT)
    found = load_file(tmp_path / "ft" / "model.safetensors")
    assert not torch.equal(found["lm_head.weight"], tensors["lm_head.weight"])
    torch.testing.assert_close(found["lm_head.weight"], found["model.embed_tokens.weight"], rtol=0, atol=0)


def test_old_names_of_norms_are_trained(checkpoints, text, tmp_path):
    """LayerNorm.gamma and .beta, as bert-base-uncased has them, are renamed while they are loaded."""
    place = shutil.copytree(checkpoints["bert"], tmp_path / "s")
    tensors = load_file(place / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    spmconvert.convert(place, tmp_path / "o", calib=text, **QUICK)
    spmconvert.finetune(tmp_path / "o", tmp_path / "ft", data=text, train="norms", **SHORT)
    found = load_file(tmp_path / "ft" / "model.safetensors")
    gammas = [name for name in found if name.endswith("LayerNorm.gamma")]
    assert len(gammas) == len([name for name in tensors if name.endswith("LayerNorm.gamma")])
    assert any(not torch.equal(found[name], tensors[name]) for name in gammas)
