"""Words drawn from vocabularies of three forms, and the text of an encoder."""

import random
from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast

from spmconvert.data import drawn
from spmconvert.data.drawn import common_first, drawn_rows, stand_in_text
from spmconvert.data.library import library_text

ENCODER = BertConfig(architectures=["BertModel"])


def tokenizer_of(tokens, decoder=None):
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0]))
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("tokens", "decoder"),
    [
        (["[PAD]", "a", "β", "人", "##ing", "the", ",", "1990", "of", "##s", "für"], None),
        (["<s>", "a", "ing", "Ġ", "ĠĠĠ", "Ġa", "Ġthe", "Ġ,", "Ġ1990", "Ġof", "s", "ĠfÃ¼r", "ĠÃ"], decoders.ByteLevel()),
        (
            ["<s>", "a", "β", "人", "ing", "▁", "▁▁▁", "▁a", "▁人", "▁the", "▁,", "▁1990", "▁of", "s", "▁für"],
            decoders.Metaspace(),
        ),
    ],
)
def test_whole_words_in_the_order_of_the_vocabulary(tokens, decoder):
    assert common_first(tokenizer_of(tokens, decoder)) == ["the", "of", "für"]


def test_words_are_drawn_by_their_rank():
    words = [f"word{chr(97 + index // 26)}{chr(97 + index % 26)}" for index in range(400)]
    rows = drawn_rows(words, 200, random.Random(0))
    assert rows == drawn_rows(words, 200, random.Random(0))
    lengths = [len(row.split()) for row in rows]
    assert min(lengths) >= drawn.SHORTEST_ROW
    assert max(lengths) <= drawn.LONGEST_ROW
    counts = Counter(word for row in rows for word in row.split())
    # 1 / (0 + 10) and 1 / (90 + 10)
    assert counts[words[0]] / counts[words[90]] == pytest.approx(10, rel=0.3)
    assert len(counts) > 390


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [f"{first}{second}" for first in letters for second in letters]
    tokenizer_of(["[UNK]", *words, *(word + "s" for word in words)]).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_an_encoder_reads_prose_and_drawn_words_half_and_half(encoder):
    prose = {part: library_text(part).read_text().splitlines() for part in ("calibration", "training")}
    rows = {part: stand_in_text(part, encoder, ENCODER).read_text().splitlines() for part in prose}
    for part, lines in prose.items():
        assert len(rows[part]) == 2 * len(lines)
        assert set(lines) < set(rows[part])
    assert not set(rows["calibration"]) & set(rows["training"])
    file = stand_in_text("calibration", encoder, ENCODER)
    content = file.read_bytes()
    file.unlink()
    assert stand_in_text("calibration", encoder, ENCODER).read_bytes() == content, "the same anywhere"


def test_models_of_language_are_trained_on_drawn_words_and_calibrated_on_prose(encoder):
    config = GPT2Config(architectures=["GPT2LMHeadModel"])
    assert stand_in_text("calibration", encoder, config) == library_text("calibration")
    assert stand_in_text("training", encoder, config) == stand_in_text("training", encoder, ENCODER)


def test_a_small_vocabulary_gives_prose_alone(checkpoints):
    assert stand_in_text("training", checkpoints["bert"], ENCODER) == library_text("training")
