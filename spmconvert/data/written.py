"""Text that a causal language model writes itself, by sampling, to be calibrated and trained on where nobody gave one.

Rows begin as paragraphs of the prose that every installation has do, each as another one, and are sampled from there at
temperature 1: so they are about everything, in the model's own words. Where the tokenizer has a chat template, every other
batch is of conversations in it that start with a common word: the model says what a user says, and answers. They show the
model what it expects to see: calibrated on them it loses less elsewhere than on that prose itself, or on rows that start
with a word (docs/results.md), and still more than on a text of the right kind. They are kept in the cache by the model's
hash. Its price is the time to write, so only models up to a size do.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from spmconvert.data.library import Part, english, library_text
from spmconvert.data.tokens import load_tokenizer, reads_packed, row_length
from spmconvert.model.loading import load_dense_model
from spmconvert.system.caches import cache_directory, check_cache, keep
from spmconvert.system.devices import multiplies_bfloat16
from spmconvert.system.memory import free_memory

ROWS, TOKENS, BATCH_ROWS = 320, 160, 64
COMMON_WORDS = 1000
# part of a row that a paragraph begins
BEGINNING_SHARE = 5
# on a CPU; SmolLM2-135M writes for five minutes on two cores
MOST_PARAMETERS = 200_000_000
# on a GPU, in float32 as it is loaded, and a quarter for the rows
BYTES_A_PARAMETER = 5
# part of a row that a user may say, and what stands for it in a template
QUESTION_SHARE = 4
PLACE = "what a user says"
# what it writes for; each has paragraphs and words of its own to start with
WRITTEN: tuple[Part, ...] = ("calibration", "training")
# changes with anything that changes what is written
VERSION = 6


def written_file(part: Part, sha256: str) -> Path:
    """Where the text of a checkpoint with that hash is kept."""
    return cache_directory("texts") / f"written-{VERSION}-{part}-{sha256[:32]}.jsonl"


def writes(config: Any, parameters: int, device: str) -> bool:
    """Whether a model writes its own text: a causal one, in a time that can be waited for, with memory for all of it."""
    if not reads_packed(config) or config.is_encoder_decoder:
        return False
    if device == "cpu":
        return parameters <= MOST_PARAMETERS
    free = free_memory(device)
    return free is None or BYTES_A_PARAMETER * parameters <= free


def write_text(
    part: Part, directory: Path, sha256: str, config: Any, device: str, report: Callable[[int, int], None]
) -> Path:
    """Have a model write a text, where it has not yet.

    Args:
        part: what it is for: calibration or training, of which no row is in the other.
        directory: its checkpoint.
        sha256: hash of that.
        config: the model's config.
        device: where it runs.
        report: told how many rows are written, and of how many.

    Returns:
        A .jsonl file, one row a line.

    Raises:
        CalibrationError: when there is no tokenizer that can be used.
        NotWritableError: when the cache cannot be written.
    """
    file = written_file(part, sha256)
    if file.exists():
        return file
    check_cache("texts")
    model = load_dense_model(directory, config, device)
    if multiplies_bfloat16(device):
        # half the time on a CPU, and a word in a few is another one, of about the same probability
        model = model.to(torch.bfloat16)
    writer = _Writer(model, load_tokenizer(directory), row_length(config, TOKENS))
    beginnings, words = _beginnings(part, writer), _words(part, writer.tokenizer)
    lines: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(WRITTEN.index(part))
        for number, first in enumerate(range(0, ROWS, BATCH_ROWS)):
            rows = slice(first, first + BATCH_ROWS)
            # every other batch, where there is a template
            talks = number % 2 and writer.opening is not None
            texts = writer.talk(words[rows]) if talks else writer.write(beginnings[rows])
            lines += [json.dumps({"text": text}) for text in texts]
            report(len(lines), ROWS)
    keep(file, "\n".join(lines) + "\n")
    return file


class _Writer:
    """A model that writes rows, as running text or as a conversation in its chat template.

    Attributes:
        tokenizer: of the model.
        length: of a row, in tokens.
        opening: what its chat template puts before what a user says, or None where it has no template that can be used.
    """

    def __init__(self, model: Any, tokenizer: Any, length: int) -> None:
        self._model, self.tokenizer, self.length = model, tokenizer, length
        self.opening = _opening(tokenizer)

    def write(self, ids: torch.Tensor) -> list[str]:
        """Go on from the first tokens of rows [rows, tokens]."""
        return self._decoded(self._sampled(ids, torch.ones_like(ids), self.length - ids.shape[1]))

    def talk(self, ids: torch.Tensor) -> list[str]:
        """Say what a user says, beginning with a token [rows, 1], and answer it."""
        opening = self.tokenizer(self.opening, add_special_tokens=False, return_tensors="pt")["input_ids"]
        begun = torch.cat([opening.expand(len(ids), -1), ids], dim=1)
        said = self._sampled(begun, torch.ones_like(begun), self.length // QUESTION_SHARE)
        turns = [[{"role": "user", "content": text.strip()}] for text in self._decoded(said[:, opening.shape[1] :])]
        asked = [self._in_template(turn, answered=False) for turn in turns]
        # on the left, so that what is asked ends where the answer begins
        batch = self.tokenizer.pad(
            {"input_ids": [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked]},
            padding_side="left",
            return_tensors="pt",
        )
        prompts = batch["input_ids"]
        answers = self._sampled(prompts, batch["attention_mask"], max(1, self.length - prompts.shape[1]))
        said_back = self._decoded(answers[:, prompts.shape[1] :])
        both = zip(turns, said_back, strict=True)
        return [self._in_template([*turn, {"role": "assistant", "content": text}], answered=True) for turn, text in both]

    def _in_template(self, turns: list[dict[str, str]], *, answered: bool) -> str:
        found = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answered)
        return str(found)

    def _decoded(self, ids: torch.Tensor) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    @torch.no_grad()
    def _sampled(self, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
        own = self._model.generation_config
        # without a padding token, rows that end early are filled with the token that ends them: it is left out of the text
        endings = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        sampled: torch.Tensor = self._model.generate(
            input_ids=ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=endings[0] if own.pad_token_id is None else own.pad_token_id,
        )
        return sampled


def _opening(tokenizer: Any) -> str | None:
    """What a chat template puts before what a user says."""
    if not getattr(tokenizer, "chat_template", None) or tokenizer.pad_token_id is None:
        return None
    try:
        turn = [{"role": "user", "content": PLACE}]
        before, found, _ = str(tokenizer.apply_chat_template(turn, tokenize=False)).partition(PLACE)
    except Exception:
        # whatever a template raises: one that wants more than a user's turn is no help here
        return None
    return before if found else None


def _beginnings(part: Part, writer: _Writer) -> torch.Tensor:
    """The first tokens of paragraphs in an order by chance, [rows, tokens]."""
    length = max(1, writer.length // BEGINNING_SHARE)
    paragraphs = english(part)
    order = torch.randperm(len(paragraphs), generator=torch.Generator().manual_seed(0)).tolist()
    rows = (writer.tokenizer(paragraphs[index])["input_ids"][:length] for index in order)
    return torch.tensor(list(islice((row for row in rows if len(row) == length), ROWS)))


def _words(part: Part, tokenizer: Any) -> torch.Tensor:
    """The first token of common words, without what the tokenizer puts in front, [rows, 1]."""
    words = Counter(re.findall(r"[A-Za-z]{3,}", library_text("calibration").read_text(encoding="utf-8")))
    common = [f" {word}" for word, _ in words.most_common(COMMON_WORDS)]
    order = torch.randperm(len(common), generator=torch.Generator().manual_seed(0)).tolist()
    own = order[WRITTEN.index(part) :: len(WRITTEN)][:ROWS]
    return torch.tensor([tokenizer(common[index], add_special_tokens=False)["input_ids"][:1] for index in own])
