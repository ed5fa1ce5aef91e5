"""Text that a causal language model writes itself, by sampling from it, to be calibrated on where nobody gave a text.

Rows start with a common word each and are sampled at temperature 1. They show the model what it expects to see: calibrated
on them it loses less elsewhere than on docstrings (benchmarks/results/choices.md), and still far more than on a text of the
right kind. They are kept in the cache by the model's hash. Its price is the time to write, so only models up to a size do.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spmconvert.data.library import library_text
from spmconvert.data.tokens import load_tokenizer, reads_packed, row_length
from spmconvert.model.loading import load_dense_model
from spmconvert.system.caches import cache_directory, check_cache
from spmconvert.system.files import write_whole

ROWS, TOKENS, BATCH_ROWS = 320, 160, 64
COMMON_WORDS = 1000
# on a CPU; SmolLM2-135M writes for five minutes on two cores
MOST_PARAMETERS = 200_000_000
# changes with anything that changes what is written
VERSION = 1


def written_file(sha256: str) -> Path:
    """Where the text of a checkpoint with that hash is kept."""
    return cache_directory("texts") / f"written-{VERSION}-{sha256[:32]}.jsonl"


def writes(config: Any, parameters: int, device: str) -> bool:
    """Whether a model writes its own text: a causal one, in a time that can be waited for."""
    return reads_packed(config) and not config.is_encoder_decoder and (device != "cpu" or parameters <= MOST_PARAMETERS)


def write_text(directory: Path, sha256: str, config: Any, device: str, report: Callable[[int, int], None]) -> Path:
    """Have a model write a text, where it has not yet.

    Args:
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
    file = written_file(sha256)
    if file.exists():
        return file
    check_cache("texts")
    tokenizer = load_tokenizer(directory)
    prompts = _prompts(tokenizer)
    length = row_length(config, TOKENS)
    model = load_dense_model(directory, config, device)
    lines = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for first in range(0, ROWS, BATCH_ROWS):
            ids = prompts[first : first + BATCH_ROWS].to(device)
            texts = tokenizer.batch_decode(_sampled(model, ids, length), skip_special_tokens=True)
            lines += [json.dumps({"text": text}) for text in texts]
            report(len(lines), ROWS)
    write_whole(file, "\n".join(lines) + "\n")
    return file


def _prompts(tokenizer: Any) -> torch.Tensor:
    """What rows start with: whatever the tokenizer puts in front, and the first token of a common word, [rows, tokens]."""
    words = Counter(re.findall(r"[A-Za-z]{3,}", library_text("calibration").read_text(encoding="utf-8")))
    common = [f" {word}" for word, _ in words.most_common(COMMON_WORDS)]
    order = torch.randperm(len(common), generator=torch.Generator().manual_seed(0))[:ROWS].tolist()
    length = len(tokenizer("")["input_ids"]) + 1
    rows = [tokenizer(common[index])["input_ids"][:length] for index in order]
    return torch.tensor([row for row in rows if len(row) == length])


@torch.no_grad()
def _sampled(model: Any, ids: torch.Tensor, length: int) -> torch.Tensor:
    padding = model.generation_config.pad_token_id
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length - ids.shape[1],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0 if padding is None else padding,
    )
