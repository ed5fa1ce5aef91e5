"""Training rows: split by document, cached by content, in an order that follows from seed and step."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spmconvert.data.training import BUCKET_STEPS, MASKED_SHARE, TokenRows, batch_indices, load_training_data, step_indices
from spmconvert.errors import CalibrationError
from spmconvert.model.architecture import load_config
from spmconvert.recipe.recipe import Training


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def load(directory, file, **changes):
    training = Training(**{"block_size": 32, "held_out": 0.1, **changes})
    return load_training_data(str(file), directory, load_config(directory), training)


def test_rows_follow_the_whole_tokenizer(checkpoints, text, tmp_path):
    directory = tmp_path / "m"
    shutil.copytree(checkpoints["gpt2"], directory)
    before = load(directory, text)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    # the same words, found otherwise
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "a"}
    file.write_text(json.dumps(content))
    after = load(directory, text)
    assert not torch.equal(before.training[0], after.training[0])


@pytest.mark.parametrize("held_out", [0.02, 0.98])
def test_the_part_that_is_too_short_is_named(checkpoints, text, held_out):
    part, documents = ("held-out", 1) if held_out < 0.5 else ("training", 1)
    changes = {"block_size": 64, "held_out": 0.001 if held_out < 0.5 else 0.999}
    directory = checkpoints["gpt2"]
    short = text.parent / "short.txt"
    short.write_text("\n".join(line[:40] for line in text.read_text().splitlines()))
    with pytest.raises(CalibrationError, match=rf"the {part} part of .*, {documents} of 300 documents, has 41 tokens"):
        load(directory, short, **changes)


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
    monkeypatch.setattr("spmconvert.data.training.token_rows", lambda *_: pytest.fail("tokenised again"))
    again = load(checkpoints["gpt2"], text)
    assert torch.equal(first.training[3], again.training[3])
    monkeypatch.undo()
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "\nanother line that makes this a different text altogether, and long enough")
    monkeypatch.setenv("SPMCONVERT_CACHE", str(cache.parent))
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


def test_steps_have_rows_of_like_length():
    sizes = np.random.default_rng(0).integers(4, 64, 400)
    rows = TokenRows(np.zeros(sizes.sum(), np.int32), sizes.cumsum(), padding=0)
    steps = [step_indices(rows, 8, step, seed=3) for step in range(2 * BUCKET_STEPS)]
    together = [index for step in steps[:BUCKET_STEPS] for index in step]
    assert sorted(together) == sorted(batch_indices(400, 8 * BUCKET_STEPS, 0, seed=3))
    padded = sum(8 * max(map(rows.size, step)) for step in steps)
    plain = [batch_indices(400, 8, step, seed=3) for step in range(2 * BUCKET_STEPS)]
    assert padded < 0.7 * sum(8 * max(map(rows.size, step)) for step in plain)
    longest = [max(map(rows.size, step)) for step in steps[:BUCKET_STEPS]]
    assert longest != sorted(longest)
    few = TokenRows(np.zeros(6, np.int32), np.arange(1, 7), padding=0)
    assert len(step_indices(few, 8, 3, seed=3)) == 8


@pytest.mark.parametrize(
    ("content", "message"), [("", "empty"), ("one line only, " * 9, "one document"), ("a b\nc d\ne f", "one row has")]
)
def test_texts_that_are_too_short(checkpoints, tmp_path, content, message):
    file = tmp_path / "t.txt"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load(checkpoints["gpt2"], file)


def test_masks_follow_from_seed_and_step(checkpoints, text, tmp_path):
    import shutil

    from transformers import AutoTokenizer, BertForMaskedLM

    from tests.conftest import bert_config

    directory = tmp_path / "mlm"
    shutil.copytree(checkpoints["bert"], directory)
    model = BertForMaskedLM(bert_config())
    model.save_pretrained(directory)
    with pytest.raises(CalibrationError, match="no mask token"):
        load(directory, text)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.mask_token = "~"
    tokenizer.save_pretrained(directory)
    rows = load(directory, text).training
    first, again, later = (rows.batch(range(8), model, step) for step in (1, 1, 2))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], later["input_ids"])
    masked = first["input_ids"] == rows.masking.token
    assert MASKED_SHARE / 2 < masked.sum() / first["attention_mask"].sum() < 2 * MASKED_SHARE
    assert torch.equal(masked, first["labels"] != -100)
    restored = first["input_ids"].where(~masked, first["labels"])
    assert restored[0, : rows.size(0)].tolist() == rows[0].tolist()


def test_column_parquet_and_datasets(checkpoints, text, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    lines = text.read_text().splitlines()
    expected = load(checkpoints["gpt2"], text).training[0]
    for column in ("text", "body"):
        parquet.write_table(pa.table({column: lines, "n": list(range(len(lines)))}), tmp_path / f"{column}.parquet")
    assert torch.equal(load(checkpoints["gpt2"], tmp_path / "text.parquet").training[0], expected)
    assert torch.equal(load(checkpoints["gpt2"], tmp_path / "body.parquet", column="body").training[0], expected)
    with pytest.raises(CalibrationError, match="no column 'text'; it has body, n"):
        load(checkpoints["gpt2"], tmp_path / "body.parquet")
    (tmp_path / "set").mkdir()
    (tmp_path / "text.parquet").rename(tmp_path / "set" / "train.parquet")
    found = load(checkpoints["gpt2"], f"datasets:{tmp_path / 'set'}")
    assert torch.equal(found.training[0], expected)
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        load(checkpoints["gpt2"], f"datasets:{tmp_path / 'none'}")
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(CalibrationError, match="cannot be read"):
        load(checkpoints["gpt2"], tmp_path / "broken.parquet")


def test_processor_tensors(checkpoints, tmp_path):
    file = tmp_path / "t.safetensors"
    save_file({"pixel_values": torch.arange(40.0).view(10, 2, 2)}, file)
    found = load(checkpoints["bert"], file, held_out=0.2)
    assert (len(found.training), len(found.held_out)) == (8, 2)
    model = type("Model", (), {"device": torch.device("cpu")})()
    batch = found.held_out.batch([1], model, 0)["pixel_values"]
    assert batch.shape == (1, 2, 2)
    item = found.held_out.chosen[1]
    assert batch.flatten().tolist() == [4 * item, 4 * item + 1, 4 * item + 2, 4 * item + 3]
    save_file({"a": torch.zeros(3), "b": torch.zeros(4)}, file)
    with pytest.raises(CalibrationError, match="same number"):
        load(checkpoints["bert"], file)
    file.write_bytes(b"no tensors")
    with pytest.raises(CalibrationError, match="cannot be read"):
        load(checkpoints["bert"], file)
