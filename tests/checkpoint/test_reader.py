"""Opening checkpoints: local, from the hub, and everything that is refused."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from spmconvert.checkpoint.headers import INDEX_FILE
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
    (source / "modules.json").write_text(
        json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../x"}])
    )
    for relative in ("2_Dense/model.safetensors", "checkpoint-500/config.json", "additional_chat_templates/tool.jinja"):
        (source / relative).parent.mkdir(exist_ok=True)
        (source / relative).write_text("x")
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
    assert {"2_Dense/model.safetensors", "additional_chat_templates/tool.jinja", "modules.json"} <= found
    assert "checkpoint-500/config.json" not in found
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


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.bfloat16, torch.int64]
)
def test_finite_values_of_every_kind(source, dtype):
    save_file({"a": torch.ones(3).to(dtype)}, source / "model.safetensors")
    assert open_checkpoint(str(source)).read_finite("a").dtype == dtype


def test_non_finite_8_bit_floats(source):
    save_file({"a": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)}, source / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match="a has 1 values"):
        open_checkpoint(str(source)).read_finite("a")


def test_file_that_vanishes_or_changes_after_opening(source):
    checkpoint = open_checkpoint(str(source))
    name = next(iter(checkpoint.tensors))
    (source / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptCheckpointError, match="is refused"):
        checkpoint.read(name)
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read \(gone\); restore it"):
        checkpoint.read(name)


def test_dtype_that_torch_does_not_have(source):
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"xyz")
    with pytest.raises(CorruptCheckpointError, match=r"F6_E2M3.*refused"):
        open_checkpoint(str(source)).read("a")


@pytest.mark.parametrize("offsets", [["0", "8"], [None, 8], [0.0, 8.0], [True, 8], {"0": 0, "8": 8}])
def test_offsets_that_are_not_integers(source, offsets):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"12345678")
    with pytest.raises(CorruptCheckpointError, match=r"expected (usize|a tuple)"):
        open_checkpoint(str(source))


def test_json_nested_too_deeply(source):
    (source / "model.safetensors").write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    with pytest.raises(CorruptCheckpointError, match="invalid JSON"):
        open_checkpoint(str(source))
    (source / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="not JSON"):
        open_checkpoint(str(source))


@pytest.mark.parametrize("weight_map", [[], None, "x", {"a": 1, "b": "x"}, {"a": ["x"]}])
def test_weight_map_that_is_no_table_of_names(source, weight_map):
    (source / "model.safetensors").unlink()
    (source / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpointError, match="not a table of file names"):
        open_checkpoint(str(source))


def test_name_the_system_refuses(source):
    (source / "model.safetensors").unlink()
    (source / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(str(source))


def test_the_single_file_wins_over_an_index(source):
    (source / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert "a" not in open_checkpoint(str(source)).tensors


def test_hub_cache_of_symbolic_links(source, tmp_path):
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    checkpoint = open_checkpoint(str(snapshot))
    assert checkpoint.read(next(iter(checkpoint.tensors))).numel()
    assert "tokenizer.json" in [path.name for path in checkpoint.companion_files()]


def test_pickle_only(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle.*save_pretrained"):
        open_checkpoint(str(source))


def test_import_is_fast():
    code = (
        "import sys, spmconvert.checkpoint.reader, spmconvert.checkpoint.writer; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_such_directory(tmp_path):
    for name in (str(tmp_path / "none"), "./none", "a/b/c", "~no-such-user/x", ""):
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


@pytest.mark.parametrize("error", [ConnectionError("reset\nby peer"), RuntimeError("read timed out")])
def test_download_that_fails_on_the_way(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match="within reach") as caught:
        open_checkpoint("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-model-here", "owner/none", "not a valid id!", "x" * 5000])
def test_hub_id_out_of_reach(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE") as caught:
        open_checkpoint(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["..", ".", "../other", "a/b", "/tmp", 3])
def test_modules_lie_beside_their_list(source, name):
    (source.parent / "other").mkdir()
    (source.parent / "other" / "id_rsa").write_text("KEY")
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "id_rsa").write_text("KEY")
    (source / "modules.json").write_text(json.dumps([{"path": name}]))
    companions = open_checkpoint(str(source)).companion_files()
    assert {path.parent for path in companions} == {source}
    assert len(companions) == len(set(companions))


@pytest.mark.parametrize("link", ["vocab.txt", "additional_chat_templates", "1_Pooling/config.json", "1_Pooling"])
def test_no_companion_comes_from_outside(source, tmp_path, link):
    private = tmp_path / "private"
    private.mkdir()
    (private / "config.json").write_text("KEY")
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    if "/" in link:
        (source / link).parent.mkdir(exist_ok=True)
        (source / link).unlink(missing_ok=True)
    (source / link).symlink_to(private if "." not in link else private / "config.json")
    with pytest.raises(CheckpointError, match=rf"{link}.* is a link to .*outside of the checkpoint"):
        open_checkpoint(str(source)).companion_files()


def test_links_inside_of_a_checkpoint_and_of_the_hub_are_followed(source, tmp_path):
    (source / "vocab.txt").symlink_to("config.json")
    assert "vocab.txt" in [path.name for path in open_checkpoint(str(source)).companion_files()]
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    shutil.move(source, snapshot)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "f00").write_text("[UNK]")
    (snapshot / "merges.txt").symlink_to("../../blobs/f00")
    assert "merges.txt" in [path.name for path in open_checkpoint(str(snapshot)).companion_files()]
    (tmp_path / "private").write_text("KEY")
    (snapshot / "added_tokens.json").symlink_to("../../../private")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        open_checkpoint(str(snapshot)).companion_files()


def test_a_module_whose_weights_are_a_pickle_is_refused(source):
    """Its copy would have none."""
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*the module 2_Dense has no other weights"):
        open_checkpoint(str(source)).companion_files()
    (source / "2_Dense" / "model.safetensors").write_bytes(b"safe")
    assert "pytorch_model.bin" not in [path.name for path in open_checkpoint(str(source)).companion_files()]


def test_a_transformer_in_a_folder_of_its_own_is_named(tmp_path):
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "0_Transformer" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="keeps its transformer in 0_Transformer"):
        open_checkpoint(str(tmp_path))


def test_an_adapter_beside_the_weights_is_refused(source):
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it with merge_and_unload"):
        open_checkpoint(str(source))
