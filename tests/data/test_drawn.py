"""Words drawn from vocabularies of three forms, and the text of an encoder."""

import random
from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast

from spmconvert.data import drawn
from spmconvert.data.drawn import common_first, drawn_rows, sentences, stand_in_text
from spmconvert.data.library import library_text, prose

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


def test_an_encoder_reads_prose_and_half_as_many_rows_of_drawn_words(encoder):
    texts = {part: library_text(part).read_text().splitlines() for part in ("calibration", "training")}
    rows = {part: stand_in_text(part, encoder, ENCODER).read_text().splitlines() for part in texts}
    for part, lines in texts.items():
        cut = set(lines) & set(prose()[::2])
        parts = [sentence for line in sorted(cut) for sentence in sentences(line)]
        assert len(parts) > 3 * len(cut)
        assert len(rows[part]) == len(lines) - len(cut) + len(parts) + len(lines) // 2
        assert {*parts, *lines} - cut < set(rows[part])
    assert not set(rows["calibration"]) & set(rows["training"])
    file = stand_in_text("calibration", encoder, ENCODER)
    content = file.read_bytes()
    file.unlink()
    assert stand_in_text("calibration", encoder, ENCODER).read_bytes() == content, "the same anywhere"


@pytest.mark.parametrize("part", ["calibration", "training"])
def test_models_of_language_read_prose_alone(encoder, part):
    config = GPT2Config(architectures=["GPT2LMHeadModel"])
    assert stand_in_text(part, encoder, config) == library_text(part)


def test_a_small_vocabulary_gives_prose_alone(checkpoints):
    assert stand_in_text("training", checkpoints["bert"], ENCODER) == library_text("training")


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("Short. Also short.", ["Short. Also short."]),
        (f"{'A' * 70}. \"Quoted {'b' * 60}?\" (In brackets, {'c' * 60}.) Short.",
         [f"{'A' * 70}.", f"\"Quoted {'b' * 60}?\"", f"(In brackets, {'c' * 60}.) Short."]),
        (f"At 3.14 p.m. he {'came ' * 12}home! {'Z' * 64}", [f"At 3.14 p.m. he {'came ' * 12}home!", "Z" * 64]),
    ],
)  # fmt: skip
def test_paragraphs_are_cut_into_sentences(paragraph, expected):
    assert sentences(paragraph) == expected
    assert " ".join(expected) == paragraph
