"""Training rows: split by document, cached by content, in an order that follows from seed and step."""

import pytest
import torch

from spmconvert.distill.data import batch_indices, load_training_text
from spmconvert.errors import CalibrationError
from spmconvert.surgery.architecture import load_config


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(directory, file, **changes):
    return load_training_text(
        file, directory, load_config(directory), **{"tokens": 32, "held_out": 0.1, "seed": 0, **changes}
    )


def test_packed_rows_are_full_and_documents_are_on_one_side(checkpoints, text):
    found = load(checkpoints["gpt2"], text)
    assert {len(found.training[i]) for i in range(len(found.training))} == {32}
    assert len(found.held_out) > 5
    one_each = load(checkpoints["bert"], text)
    assert len(one_each.training) == 270
    assert len(one_each.held_out) == 30
    rows = {tuple(part[i].tolist()) for part in (one_each.training, one_each.held_out) for i in range(len(part))}
    assert len(rows) == 300


def test_cache_is_used_and_follows_the_content(checkpoints, text, tmp_path, cache, monkeypatch):
    first = load(checkpoints["gpt2"], text)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("spmconvert.distill.data.token_rows", lambda *_: pytest.fail("tokenised again"))
    again = load(checkpoints["gpt2"], text)
    assert torch.equal(first.training[3], again.training[3])
    monkeypatch.undo()
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "\nanother line that makes this a different text altogether, and long enough")
    monkeypatch.setenv("SPMCONVERT_CACHE", str(cache))
    for changed in (lambda: load(checkpoints["gpt2"], other), lambda: load(checkpoints["gpt2"], text, seed=1)):
        before = len(list(cache.iterdir()))
        changed()
        assert len(list(cache.iterdir())) == before + 1


def test_order_covers_every_row_once_an_epoch():
    seen = [i for step in range(7) for i in batch_indices(21, 6, step, seed=3)]
    assert sorted(seen[:21]) == list(range(21))
    assert sorted(seen[21:42]) == list(range(21))
    assert seen[:21] != seen[21:42]
    assert batch_indices(21, 6, 4, seed=3) == seen[24:30]
    assert batch_indices(21, 6, 0, seed=4) != seen[:6]
    assert len(batch_indices(3, 10, 0, seed=0)) == 10


@pytest.mark.parametrize(
    ("content", "message"), [("", "empty"), ("one line only, " * 9, "one document"), ("a b\nc d\ne f", "one row has")]
)
def test_texts_that_are_too_short(checkpoints, tmp_path, content, message):
    file = tmp_path / "t.txt"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load(checkpoints["gpt2"], file)
