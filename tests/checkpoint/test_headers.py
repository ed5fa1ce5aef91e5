"""Headers of safetensors files: everything that does not add up is refused with one clear line."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from spmconvert.checkpoint.headers import INDEX_FILE, read_header, read_headers
from spmconvert.errors import CheckpointError, CorruptCheckpointError


def write(file, header, data, length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)
    return file


def entry(start, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


TWICE = '{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": {"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
# values of keys that nothing reads
UNKNOWN = '{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":%s}}'


def test_entries_match_the_library(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.arange(4),
        "d": torch.tensor(2.5),
        "e": torch.zeros(0, 4),
        "f": torch.randn(4).to(torch.float8_e4m3fn),
        "g": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = read_headers(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].nbytes == tensor.numel() * tensor.element_size()
        content = found[name].file.read_bytes()[found[name].start : found[name].end]
        assert content == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"a": entry(0, 8)}, b"12345678extra", None, "not fully covered"),
        ({"a": entry(0, 8)}, b"1234", None, "not fully covered"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12, None, "offset for tensor `b`"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12, None, "offset for tensor `b`"),
        ({"a": entry(4, 8)}, b"x" * 8, None, "offset for tensor `a`"),
        ({"a": entry(0, 8, shape=[3])}, b"x" * 8, None, "invalid shape"),
        ({"a": entry(8, 0, shape=[2])}, b"x" * 8, None, "offset for tensor `a`"),
        ({"a": entry(0, 8, shape=[2**40, 2**40])}, b"x" * 8, None, "overflow"),
        ({"a": entry(0, 2, dtype="F4", shape=[3])}, b"x" * 2, None, "subbyte"),
        ({"a": entry(0, 8, dtype="Q7")}, b"x" * 8, None, "unknown variant"),
        ({"a": {"dtype": "F32"}}, b"", None, "missing field"),
        ({"a": entry(0, 8, shape=[-2])}, b"x" * 8, None, "expected usize"),
        ({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, b"x" * 8, None, "expected 2 elements"),
        ({"a": entry(0, 8), "__metadata__": {"format": 1}}, b"x" * 8, None, "expected a string"),
        (b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', b"x" * 8, None, "duplicate field"),
        (TWICE.encode(), b"x" * 16, None, "offset for tensor `a`"),
        ((UNKNOWN % ("[" * 200_000 + "]" * 200_000)).encode(), b"x" * 8, None, "recursion limit"),
        ({"two\nlines": entry(4, 8)}, b"x" * 8, None, "offset for tensor `two"),
        ((UNKNOWN % ("9" * 9999)).encode(), b"x" * 8, None, "out of range"),
        (b"{not json", b"", None, "invalid JSON"),
        (b"[]", b"", None, "invalid JSON"),
        (b'{"\xff": 1}', b"", None, "UTF-8"),
        (b'{"\\ud800": 1}', b"", None, "invalid JSON"),
        ({"a": entry(0, 8)}, b"x" * 8, 10**9, "too large"),
        ({"a": entry(0, 8)}, b"x" * 8, 10**7, "header length"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_found(tmp_path, header, data, length, message):
    file = write(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        read_header(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_empty_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match="too small"):
        read_headers(tmp_path)


def test_entries_come_by_offset_whatever_their_names(tmp_path):
    header = {"b": entry(0, 4), "c": entry(4, 4), "a": entry(4, 12)}
    found = read_header(write(tmp_path / "model.safetensors", dict(reversed(header.items())), b"x" * 12))
    assert list(found) == ["b", "c", "a"]
    assert found["a"].file.read_bytes()[found["a"].start :] == b"x" * 8


def shards(directory, weight_map):
    save_file({"a": torch.ones(2)}, directory / "one.safetensors")
    save_file({"b": torch.ones(3)}, directory / "two.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_sharded(tmp_path):
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    found = read_headers(tmp_path)
    assert [found[name].file.name for name in "ab"] == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../one.safetensors"}, "not beside it"),
        ({"a": "/etc/passwd"}, "not beside it"),
        ({"a": "sub/one.safetensors"}, "not beside it"),
        ({"a": "..\\one.safetensors"}, "not beside it"),
        ({"a": "three.safetensors"}, "missing"),
    ],
)
def test_index_that_does_not_add_up(tmp_path, weight_map, message):
    shards(tmp_path, weight_map)
    with pytest.raises(CorruptCheckpointError, match=message):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "names"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, {"a", "b"}),
        ({"a": "two.safetensors", "b": "two.safetensors"}, {"b"}),
        ({"b": "one.safetensors"}, {"a"}),
    ],
)
def test_what_shards_have_counts_whatever_the_index_says_of_it(tmp_path, weight_map, names):
    """As in transformers; a model that misses a tensor is not loaded."""
    shards(tmp_path, weight_map)
    assert read_headers(tmp_path).keys() == names


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "two.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"has the tensor a, which one\.safetensors has, too"):
        read_headers(tmp_path)


def test_index_without_map(tmp_path):
    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(CorruptCheckpointError, match="weight_map"):
        read_headers(tmp_path)


def test_pickle_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pickle.*save_pretrained"):
        read_headers(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        read_headers(tmp_path)
