"""How far a model is from the dense one it came from, on rows that neither has been fitted on.

What is compared follows from the architecture: distributions over words (KL a token in nats, top-1 agreement, and
perplexity where the model is causal), classes (agreement and KL a row), the scores of a model with one output (whether rows
rank as before, and by how much scores differ), or the representations of an encoder (cosine of states and of mean-pooled
embeddings, and whether pairs of texts are as similar as before; of towers side by side texts and pictures). Everything is
computed in float32 from the outputs of the models as they are loaded; standard errors are over rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax, normalize

from spmconvert.data.media import MediaRow
from spmconvert.data.rows import row_batch
from spmconvert.data.tokens import reads_packed
from spmconvert.outputs.objective import class_logits, first_states, objective_for, paired_embeddings, real_mask
from spmconvert.reporting.rows import EvaluationRows
from spmconvert.reporting.schema import Metric

BATCH_ROWS = 4
BOOTSTRAP_DRAWS = 200


@dataclass
class _Means:
    """Sums of one measure by row, for its mean over samples and the standard error over rows."""

    totals: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, values: Tensor, mask: Tensor) -> None:
        """Add values [rows, samples] where the mask is true."""
        self.totals += (values * mask).sum(-1).tolist()
        self.counts += mask.sum(-1).tolist()

    @property
    def samples(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        return sum(self.totals) / self.samples

    @property
    def standard_error(self) -> float | None:
        if len(self.counts) < 2:
            return None
        rows = torch.tensor([total / max(number, 1) for total, number in zip(self.totals, self.counts, strict=True)])
        return float(rows.std() / len(rows) ** 0.5)


def compare(dense: Any, other: Any, rows: EvaluationRows) -> tuple[Metric, ...]:
    """Measure a model against the dense one; the first metric is the headline."""
    measures: dict[str, Callable[[Any, Any, EvaluationRows], tuple[Metric, ...]]] = {
        "logits": _compare_words,
        "classes": _compare_classes,
        "scores": _compare_scores,
        "hidden": _compare_representations,
    }
    return measures[objective_for(dense.config)](dense, other, rows)


def _outputs(dense: Any, other: Any, rows: EvaluationRows) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    for first in range(0, len(rows.rows), BATCH_ROWS):
        batch = row_batch(rows.rows[first : first + BATCH_ROWS], rows.padding, dense)
        with torch.no_grad():
            yield batch, dense(**batch), other(**batch)


def _compare_words(dense: Any, other: Any, rows: EvaluationRows) -> tuple[Metric, ...]:
    divergence, agreement, other_loss, dense_loss = _Means(), _Means(), _Means(), _Means()
    causal = reads_packed(dense.config) and not dense.config.is_encoder_decoder
    for batch, target, other_outputs in _outputs(dense, other, rows):
        mask = _mask(batch, target.logits)
        divergence.add(_kl(target.logits, other_outputs.logits), mask)
        agreement.add((target.logits.argmax(-1) == other_outputs.logits.argmax(-1)).float(), mask)
        if causal:
            following = mask[:, 1:]
            other_loss.add(_next_token_loss(other_outputs.logits, batch["input_ids"]), following)
            dense_loss.add(_next_token_loss(target.logits, batch["input_ids"]), following)
    metrics = [
        _metric("kl", "KL divergence a token", "nats", divergence, "tokens", higher=False),
        _metric("top1", "top-1 agreement", "share", agreement, "tokens", higher=True),
    ]
    if causal:
        metrics.append(_perplexity(dense_loss, other_loss))
    return tuple(metrics)


def _compare_classes(dense: Any, other: Any, rows: EvaluationRows) -> tuple[Metric, ...]:
    divergence, agreement = _Means(), _Means()
    for batch, target, other_outputs in _outputs(dense, other, rows):
        # one decision a row, or one a token
        mask = _mask(batch, target.logits) if target.logits.ndim > 2 else torch.ones_like(target.logits[:, :1]).bool()
        shape = (*mask.shape, target.logits.shape[-1])
        target_logits, other_logits = target.logits.reshape(shape), other_outputs.logits.reshape(shape)
        divergence.add(_kl(target_logits, other_logits), mask)
        agreement.add((target_logits.argmax(-1) == other_logits.argmax(-1)).float(), mask)
    return (
        _metric("agreement", "same class", "share", agreement, "decisions", higher=True),
        _metric("kl", "KL divergence a decision", "nats", divergence, "decisions", higher=False),
    )


def _compare_scores(dense: Any, other: Any, rows: EvaluationRows) -> tuple[Metric, ...]:
    targets, other_scores = [], []
    for batch, target, other_outputs in _outputs(dense, other, rows):
        targets.append(class_logits(target, batch).float().flatten().cpu())
        other_scores.append(class_logits(other_outputs, batch).float().flatten().cpu())
    wanted, scores = torch.cat(targets), torch.cat(other_scores)
    errors = (scores - wanted).square() / wanted.var(correction=0).clamp_min(torch.finfo().tiny)
    error = Metric(
        key="score_error",
        title="squared error of scores over their variance",
        unit="",
        dense=None,
        converted=float(errors.mean()),
        higher_is_better=False,
        samples=len(errors),
        sample="scores",
        standard_error=float(errors.std() / len(errors) ** 0.5) if len(errors) > 1 else None,
    )
    return (_score_ranking(wanted, scores), error) if len(wanted) >= 3 else (error,)


def _score_ranking(dense: Tensor, other: Tensor) -> Metric:
    """Spearman correlation of the scores [positions] of both models, its standard error a bootstrap."""
    draws = torch.randint(0, len(dense), (BOOTSTRAP_DRAWS, len(dense)), generator=torch.Generator().manual_seed(0))
    return Metric(
        key="ranking",
        title="ranking of scores (Spearman)",
        unit="",
        dense=None,
        converted=_spearman(dense, other),
        higher_is_better=True,
        samples=len(dense),
        sample="scores",
        standard_error=float(torch.tensor([_spearman(dense[drawn], other[drawn]) for drawn in draws]).std()),
    )


def _compare_representations(dense: Any, other: Any, rows: EvaluationRows) -> tuple[Metric, ...]:
    states, embeddings = _Means(), _Means()
    pooled: list[tuple[Tensor, Tensor]] = []
    sides: list[tuple[Tensor, Tensor]] = []
    for batch, target, other_outputs in _outputs(dense, other, rows):
        target_states, other_states = (_by_position(first_states(outputs).float()) for outputs in (target, other_outputs))
        mask = _mask(batch, target_states)
        states.add(cosine_similarity(other_states, target_states, dim=-1), mask)
        pair = _mean_pooled(target_states, mask), _mean_pooled(other_states, mask)
        embeddings.add(cosine_similarity(pair[0], pair[1], dim=-1)[:, None], mask.any(-1, keepdim=True))
        pooled.append((pair[0].cpu(), pair[1].cpu()))
        if paired_embeddings(target) is not None:
            sides.append((target_states.cpu(), other_states.cpu()))
    if sides and len(rows.rows) >= 3:
        both = [torch.cat(part) for part in zip(*sides, strict=True)]
        return _compare_sides(both[0], both[1], states)
    what = "item" if isinstance(rows.rows[0], MediaRow) else "text"
    metrics = [
        _metric("embedding", f"cosine of {what} embeddings", "", embeddings, f"{what}s", higher=True),
        _metric("states", "cosine of token states", "", states, "tokens", higher=True),
    ]
    if len(rows.rows) >= 3:
        first, second = (torch.cat(part) for part in zip(*pooled, strict=True))
        metrics.insert(0, _similarity_ranking(first, second, what))
    return tuple(metrics)


def _compare_sides(dense: Tensor, other: Tensor, states: _Means) -> tuple[Metric, ...]:
    """How every text ranks with every picture, by embeddings of both [rows, 2, features]; the error is a bootstrap."""
    first, second = (normalize(both[:, 0], dim=-1) @ normalize(both[:, 1], dim=-1).t() for both in (dense, other))
    draws = torch.randint(0, len(dense), (BOOTSTRAP_DRAWS, len(dense)), generator=torch.Generator().manual_seed(0))
    drawn = [_spearman(*(matrix[rows][:, rows].flatten() for matrix in (first, second))) for rows in draws]
    ranking = Metric(
        key="similarity",
        title="ranking of text and picture similarities (Spearman)",
        unit="",
        dense=None,
        converted=_spearman(first.flatten(), second.flatten()),
        higher_is_better=True,
        samples=first.numel(),
        sample="texts with pictures",
        standard_error=float(torch.tensor(drawn).std()),
    )
    return ranking, _metric("embedding", "cosine of embeddings", "", states, "texts and pictures", higher=True)


def _mask(batch: dict[str, Any], states: Tensor) -> Tensor:
    """Positions [rows, positions] that are no padding, of states or logits; all where the batch does not say."""
    mask = real_mask(batch, states)
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask


def _by_position(states: Tensor) -> Tensor:
    """States as [rows, positions, features], of models that keep pictures as [rows, features, height, width], too."""
    return states.flatten(2).mT if states.ndim == 4 else states


def _similarity_ranking(dense: Tensor, other: Tensor, what: str) -> Metric:
    """Spearman correlation of the similarities of all pairs of rows [rows, features], as each model sees them.

    The standard error is a bootstrap over rows: pairs that share a row are not independent.
    """
    similarities = [unit @ unit.t() for unit in (normalize(dense, dim=-1), normalize(other, dim=-1))]
    first, second = torch.triu_indices(len(dense), len(dense), offset=1)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(BOOTSTRAP_DRAWS):
        texts = torch.randint(0, len(dense), (len(dense),), generator=generator)
        left, right = texts[first], texts[second]
        # a text drawn twice would be compared with itself
        distinct = left != right
        if distinct.sum() > 1:
            drawn.append(_spearman(*(matrix[left[distinct], right[distinct]] for matrix in similarities)))
    return Metric(
        key="similarity",
        title=f"ranking of {what} similarities (Spearman)",
        unit="",
        dense=None,
        converted=_spearman(*(matrix[first, second] for matrix in similarities)),
        higher_is_better=True,
        samples=len(dense),
        sample=f"{what}s, in pairs",
        standard_error=float(torch.tensor(drawn).std()),
    )


def _spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two vectors; equal values share their mean rank, and what is all equal ranks nothing."""
    ranks = []
    for values in (first, second):
        ordered = values.sort().values
        ranks.append((torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double())
    return float(torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num(0.0))


def _kl(target: Tensor, other: Tensor) -> Tensor:
    """KL(target || other) over the last axis of logits."""
    log_target, log_other = log_softmax(target.float(), -1), log_softmax(other.float(), -1)
    return kl_div(log_other, log_target, reduction="none", log_target=True).sum(-1)


def _next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log likelihood of every following token, [rows, tokens - 1], nats."""
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")


def _mean_pooled(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].float()
    return (states * weights).sum(1) / weights.sum(1)


def _metric(key: str, title: str, unit: str, means: _Means, sample: str, *, higher: bool) -> Metric:
    return Metric(
        key=key,
        title=title,
        unit=unit,
        dense=None,
        converted=means.mean,
        higher_is_better=higher,
        samples=means.samples,
        sample=sample,
        standard_error=means.standard_error,
    )


def _perplexity(dense: _Means, other: _Means) -> Metric:
    return Metric(
        key="perplexity",
        title="perplexity",
        unit="",
        dense=float(torch.tensor(dense.mean).exp()),
        converted=float(torch.tensor(other.mean).exp()),
        higher_is_better=False,
        samples=other.samples,
        sample="tokens",
    )
