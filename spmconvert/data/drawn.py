"""Words drawn at random from a tokenizer's own vocabulary, beside prose that every machine has.

Vocabularies are sorted by how often their words were met, so Zipf's law over that order gives about the words of the text
that the tokenizer was made from, names and rare ones included, of which two megabytes of prose have few. An encoder that is
fitted or trained on them beside prose loses less elsewhere than on prose alone. It also reads half of the prose a
sentence at a time, as much of what it is used on is short. A model of language reads prose alone: to be fitted
it gains nothing by drawn words, since what follows from what is lost with the order of words (docs/results.md). Whether it
would be trained better on them beside prose is not measured; beside docstrings alone it was.
"""

import random
import re
from pathlib import Path
from typing import Any

from spmconvert.data.documents import SHORTEST_DOCUMENT
from spmconvert.data.library import Part, library_text, prose
from spmconvert.data.tokens import load_tokenizer, reads_packed, tokenizer_hash
from spmconvert.system.caches import keep

# how vocabularies of bytes and of pieces mark the start of a word; those that mark continuations have neither
WORD_STARTS = ("Ġ", "▁")
CONTINUATION = "##"
FEWEST_WORDS = 1000
# Zipf's law as Mandelbrot put it, so that the first words do not make up all of a row
RANK_OFFSET = 10
SHORTEST_ROW, LONGEST_ROW = 15, 90
SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))\s(?=["'(\[]?[A-Z])""")
# changes with anything that changes what is drawn
VERSION = 3


def stand_in_text(part: Part, directory: Path, config: Any) -> Path:
    """Prose that every installation has and, for encoders, a row of drawn words for every two paragraphs of it.

    Args:
        part: what it is for; no row is in two parts.
        directory: checkpoint, for its tokenizer.
        config: the model's config.

    Returns:
        A .txt file in the cache, one row a line; written where it is not there. Prose alone for models of language, and
        where the vocabulary has too few words.

    Raises:
        CalibrationError: when there is no tokenizer that can be used, or the standard library is here without its sources.
        NotWritableError: when the cache cannot be written.
    """
    text = library_text(part)
    if reads_packed(config):
        return text
    file = text.with_name(f"{text.stem}-drawn-{VERSION}-{tokenizer_hash(directory)[:16]}.txt")
    if file.exists():
        return file
    words = common_first(load_tokenizer(directory))
    if len(words) < FEWEST_WORDS:
        return text
    paragraphs = text.read_text(encoding="utf-8").splitlines()
    # docstrings are short as they are, and have sentences in common
    cut = set(prose()[::2])
    rows = [row for paragraph in paragraphs for row in (sentences(paragraph) if paragraph in cut else [paragraph])]
    generator = random.Random(part)
    rows += drawn_rows(words, len(paragraphs) // 2, generator)
    generator.shuffle(rows)
    keep(file, "\n".join(rows) + "\n")
    return file


def sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph, those too short to be a row with the next ones, or at the end the one before."""
    found = [""]
    for sentence in SENTENCE_END.split(paragraph):
        if len(found[-1]) >= SHORTEST_DOCUMENT:
            found.append("")
        found[-1] = f"{found[-1]} {sentence}".strip()
    if len(found) > 1 and len(found[-1]) < SHORTEST_DOCUMENT:
        found[-2:] = [" ".join(found[-2:])]
    return found


def common_first(tokenizer: Any) -> list[str]:
    """Whole words of a tokenizer's vocabulary in its order, the common ones first.

    Single characters are left out: they are the alphabet, which comes before all words whatever its letters' frequency; in
    BERT's vocabulary 900 of foreign scripts are ahead of "the".
    """
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    starts = [token for token, _ in tokens if token.startswith(WORD_STARTS)]
    # vocabularies of bytes spell letters beyond ASCII by other ones
    words = [tokenizer.convert_tokens_to_string([token]).strip() for token in starts]
    words = words or [token for token, _ in tokens if not token.startswith(CONTINUATION)]
    return [word for word in words if word.isalpha() and len(word) > 1]


def drawn_rows(words: list[str], count: int, generator: random.Random) -> list[str]:
    """Rows of words, each drawn with a probability that falls with its rank."""
    weights = [1 / (rank + RANK_OFFSET) for rank in range(len(words))]
    lengths = [generator.randint(SHORTEST_ROW, LONGEST_ROW) for _ in range(count)]
    return [" ".join(generator.choices(words, weights=weights, k=length)) for length in lengths]
