"""Opening checkpoints: local, from the hub, and everything that is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from spmconvert.checkpoint.reader import HUB_PATTERNS, open_checkpoint
from spmconvert.errors import CheckpointError, CorruptCheckpointError, ModelNotFoundError


@pytest.fixture
def source(checkpoints, tmp_path):
    directory = tmp_path / "source"
    shutil.copytree(checkpoints["bert"], directory)
    return directory


def test_read_gives_the_tensor(source):
    checkpoint = open_checkpoint(str(source))
    expected = load_file(source / "model.safetensors")
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.revision is None


def test_hash_depends_on_weights_and_config_only(source):
    first = open_checkpoint(str(source)).sha256()
    (source / "notes.txt").write_text("x")
    assert open_checkpoint(str(source)).sha256() == first
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "new": 1}))
    second = open_checkpoint(str(source)).sha256()
    tensors = load_file(source / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors")
    assert len({first, second, open_checkpoint(str(source)).sha256()}) == 3


def test_companion_files(source):
    for relative in ("1_Pooling/config.json", "chat_template.jinja", "LICENSE", "vocab.txt", "generation_config.json"):
        (source / relative).parent.mkdir(exist_ok=True)
        (source / relative).write_text("x")
    for relative in (
        "README.md",
        "spm.json",
        "pytorch_model.bin",
        "tf_model.h5",
        "onnx/model.onnx",
        "onnx/config.json",
        ".git/x",
    ):
        (source / relative).parent.mkdir(exist_ok=True)
        (source / relative).write_text("x")
    found = {str(path.relative_to(source)) for path in open_checkpoint(str(source)).companion_files()}
    expected = {"1_Pooling/config.json", "chat_template.jinja", "LICENSE", "vocab.txt", "generation_config.json"}
    assert expected | {"tokenizer.json", "tokenizer_config.json"} <= found
    assert not found & {"config.json", "README.md", "spm.json", "pytorch_model.bin", "tf_model.h5", "model.safetensors"}
    assert not any(name.startswith(("onnx", ".git")) for name in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite(source, value):
    tensors = load_file(source / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    tensors[name][1, :2] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=rf"{name} has 2 values"):
        open_checkpoint(str(source)).read_finite(name)


def test_no_such_directory(tmp_path):
    for name in (str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(ModelNotFoundError, match="no directory"):
            open_checkpoint(name)


def test_file_instead_of_directory(source):
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(str(source / "config.json"))


@pytest.mark.parametrize(("content", "message"), [(None, "no config.json"), ("{", "not JSON"), ("[]", "not a JSON object")])
def test_bad_config(source, content, message):
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(source))


@pytest.mark.parametrize(("method", "message"), [("spm", "already converted"), ("gptq", "quantised with 'gptq'")])
def test_quantised_checkpoints(source, method, message):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(source))


def test_hub_id_is_fetched_without_pickles(source, monkeypatch):
    import huggingface_hub

    asked = {}
    snapshot = source.parent / "0123abcd"
    source.rename(snapshot)

    def fake(repo_id, *, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    checkpoint = open_checkpoint("owner/name", revision="main")
    assert checkpoint.revision == "0123abcd"
    assert asked == {"repo_id": "owner/name", "revision": "main", "patterns": list(HUB_PATTERNS)}
    assert not any("bin" in pattern or "pt" in pattern for pattern in HUB_PATTERNS)


@pytest.mark.parametrize("name", ["no-such-model-here", "owner/none", "not a valid id!"])
def test_hub_id_out_of_reach(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE") as caught:
        open_checkpoint(name)
    assert "\n" not in str(caught.value)
