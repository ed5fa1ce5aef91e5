"""A causal model writes its own text once; others do not."""

import json
import re
import shutil

import pytest
import torch

from spmconvert.checkpoint.reader import open_checkpoint
from spmconvert.data import written
from spmconvert.data.library import english, library_text
from spmconvert.data.standin import written_stand_in
from spmconvert.data.tokens import load_tokenizer, row_length
from spmconvert.data.written import write_text, writes, written_file
from spmconvert.model.architecture import load_config


@pytest.fixture
def write(checkpoints, tmp_path, monkeypatch):
    """Write the text of a checkpoint into a cache of its own; returns the file and what was told."""
    monkeypatch.setattr(written, "ROWS", 10)
    monkeypatch.setattr(written, "BATCH_ROWS", 4)

    def call(name, cache="cache", part="calibration"):
        monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / cache))
        told = []
        source = open_checkpoint(str(checkpoints.get(name, name)))
        config = load_config(source.directory)
        file = write_text(part, source.directory, source.sha256(), config, "cpu", lambda *done: told.append(done))
        assert file == written_file(part, source.sha256())
        return file, told

    return call


@pytest.mark.parametrize("name", ["gpt2", "llama-bf16"])
def test_a_text_is_written_once_and_the_same_again(write, name):
    state = torch.random.get_rng_state()
    file, told = write(name)
    assert torch.equal(torch.random.get_rng_state(), state), "nobody's random numbers depend on it"
    assert told == [(4, 10), (8, 10), (10, 10)]
    rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert len(rows) == len(set(rows)) == 10
    content = file.read_bytes()
    assert write(name) == (file, [])
    assert write(name, "other")[0].read_bytes() == content


def test_no_row_is_in_two_parts(write):
    rows = {part: write("gpt2", part=part)[0].read_text().splitlines() for part in written.WRITTEN}
    assert not set(rows["calibration"]) & set(rows["training"])
    first_words = [
        {json.loads(row)["text"].split()[0] for row in part if json.loads(row)["text"].split()} for part in rows.values()
    ]
    assert first_words[0] != first_words[1]


@pytest.mark.parametrize("part", written.WRITTEN)
def test_rows_begin_as_paragraphs_of_their_part_do(write, checkpoints, monkeypatch, part):
    given, sampled = [], written._Writer.write

    def watched(self, ids):
        given.append(ids)
        return sampled(self, ids)

    monkeypatch.setattr(written._Writer, "write", watched)
    write("llama", part=part)
    rows = torch.cat(given)
    length = row_length(load_config(checkpoints["llama"]), written.TOKENS) // written.BEGINNING_SHARE
    assert rows.shape == (10, length)
    assert length > 2
    tokenizer = load_tokenizer(checkpoints["llama"])
    beginnings = [tokenizer(line)["input_ids"][:length] for line in english(part)]
    assert all(row in beginnings for row in rows.tolist())
    assert len(set(map(tuple, rows.tolist()))) > 5


def test_rows_that_end_early_end_there(write, checkpoints, tmp_path, monkeypatch):
    directory = shutil.copytree(checkpoints["gpt2"], tmp_path / "ending")
    tokenizer = load_tokenizer(directory)
    endings = [tokenizer.eos_token_id, *range(70, 96)]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": endings}))
    caught, decoded = [], written._Writer._decoded

    def watched(self, ids):
        caught.extend(ids.tolist())
        return decoded(self, ids)

    monkeypatch.setattr(written._Writer, "_decoded", watched)
    texts = [json.loads(line)["text"] for line in write(directory)[0].read_text().splitlines()]
    begun = row_length(load_config(directory), written.TOKENS) // written.BEGINNING_SHARE
    ended = 0
    for ids, text in zip(caught, texts, strict=True):
        last = next((place for place in range(begun, len(ids)) if ids[place] in endings), len(ids) - 1)
        ended += last < len(ids) - 2
        assert set(ids[last + 1 :]) <= {tokenizer.eos_token_id}
        assert text == tokenizer.decode(ids[: last + 1], skip_special_tokens=True)
    assert ended > 2


def test_rows_to_train_on_have_prose_beside_them(write, checkpoints):
    own, _ = write("gpt2", part="training")
    source = open_checkpoint(str(checkpoints["gpt2"]))
    config = load_config(source.directory)
    found = written_stand_in("training", source, config, [], "cpu", None)
    assert found.what == "prose that comes with spmconvert, docstrings of Python, and what the model writes itself"
    rows = [json.loads(line)["text"] for line in found.file.read_text().splitlines()]
    prose = library_text("training").read_text().splitlines()
    assert sorted(rows) == sorted(prose + [json.loads(line)["text"] for line in own.read_text().splitlines()])
    assert rows[: len(prose)] != prose


TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chatting(checkpoints, tmp_path):
    """A checkpoint with a chat template; returns its directory."""
    directory = shutil.copytree(checkpoints["llama"], tmp_path / "chatting")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def test_models_with_a_chat_template_talk_in_it(chatting, checkpoints, write):
    file, told = write(chatting)
    rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert told[-1] == (10, 10)
    plain, talk = [*rows[:4], *rows[8:]], rows[4:8]
    assert not any(row.startswith("<user>") for row in plain)
    for row in talk:
        assert re.fullmatch(r"<user>.+\|<assistant>.*\|", row, flags=re.DOTALL), row
    content = file.read_bytes()
    assert write(chatting, "other")[0].read_bytes() == content
    plainly = [json.loads(line)["text"] for line in write("llama", "plain")[0].read_text().splitlines()]
    assert plainly[:4] == rows[:4]
    assert not any("<assistant>" in row for row in plainly)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('a system turn is missing') }}",
        "{% for turn in messages %}{{ turn.content | upper }}{% endfor %}",
    ],
)
def test_templates_that_are_no_help_are_left_alone(chatting, write, template):
    (chatting / "chat_template.jinja").write_text(template)
    rows = [json.loads(line)["text"] for line in write(chatting)[0].read_text().splitlines()]
    assert len(rows) == 10


def test_models_write_in_a_time_that_can_be_waited_for(checkpoints, monkeypatch):
    free = {"cuda": None}
    monkeypatch.setattr(written, "free_memory", free.get)
    causal, encoder = (load_config(checkpoints[name]) for name in ("gpt2", "bert"))
    assert writes(causal, written.MOST_PARAMETERS, "cpu")
    assert not writes(causal, written.MOST_PARAMETERS + 1, "cpu")
    assert writes(causal, written.MOST_PARAMETERS + 1, "cuda")
    free["cuda"] = written.BYTES_A_PARAMETER * written.MOST_PARAMETERS
    assert writes(causal, written.MOST_PARAMETERS, "cuda")
    assert not writes(causal, written.MOST_PARAMETERS + 1, "cuda")
    assert not writes(encoder, 1, "cpu")
