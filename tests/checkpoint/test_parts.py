"""Finished parts are read back as they were stored, in pieces, and what is gone or damaged is named."""

import pytest
import torch

from spmconvert.checkpoint.parts import Parts
from spmconvert.errors import CorruptCheckpointError, OutputError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3).t(), "a.positions": torch.tensor([1, 2], dtype=torch.uint8)}


@pytest.fixture
def parts(tmp_path):
    parts = Parts(tmp_path / "parts")
    parts.store("block 0", TENSORS, {"error": 0.5})
    return parts


def test_a_part_comes_back_whole_and_in_pieces(parts):
    tensors, record = parts.load("block 0")
    assert record == parts.record("block 0") == {"error": 0.5}
    assert set(parts.keys("block 0")) == set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(parts.tensor("block 0", name), tensor)
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype


def test_what_is_stored_again_takes_the_place_of_what_was(parts):
    parts.store("block 0", {"b": torch.ones(1)}, {})
    assert parts.keys("block 0") == ["b"]
    assert parts.record("block 0") == {}


def test_what_is_not_there_is_none_and_what_went_is_an_error(parts, tmp_path):
    assert parts.record("block 1") is None
    assert parts.load("block 1") is None
    next((tmp_path / "parts").iterdir()).unlink()
    with pytest.raises(OutputError, match="is gone; start again without --resume"):
        parts.tensor("block 0", "a.weight")


@pytest.mark.parametrize("read", [Parts.record, Parts.load, Parts.keys, lambda parts, name: parts.tensor(name, "a.weight")])
def test_a_damaged_part_is_named(parts, tmp_path, read):
    file = next((tmp_path / "parts").iterdir())
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CorruptCheckpointError, match="damaged; discard the run with --force"):
        read(parts, "block 0")
