"""The measures against what they are defined as, and the sentences made of them."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2LMHeadModel

from spmconvert.outputs.probe import token_batch
from spmconvert.reporting.baselines import keep_two_of_four
from spmconvert.reporting.measure import _similarity_ranking, _spearman, compare
from spmconvert.reporting.plots import _kinds
from spmconvert.reporting.rows import EvaluationRows
from spmconvert.reporting.schema import FinetuneRecord, Latency, Layer, Metric, TimingRow
from spmconvert.reporting.summary import _outcome, _training_sentences, break_even
from spmconvert.reporting.timing import interleaved
from spmconvert.system.timing import MOST_ROUNDS
from tests.conftest import bert_config, gpt2_config


def rows(*lengths):
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(3, 90, (length,), generator=generator) for length in lengths]
    return EvaluationRows("x.txt", "first", "0" * 64, made, 1, "made up")


def pair(make):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(make().eval())
    return models


def test_words_are_compared_token_by_token_without_padding():
    dense, other = pair(lambda: GPT2LMHeadModel(gpt2_config(architectures=["GPT2LMHeadModel"])))
    unseen = rows(9, 5, 12, 7, 3)
    metrics = {metric.key: metric for metric in compare(dense, other, unseen)}
    kl, same, own_loss, dense_loss = [], [], [], []
    for row in unseen.rows:
        # one row at a time has no padding
        with torch.no_grad():
            p, q = (model(row[None]).logits[0].log_softmax(-1) for model in (dense, other))
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
        own_loss += (-q[:-1].gather(1, row[1:, None])).flatten().tolist()
        dense_loss += (-p[:-1].gather(1, row[1:, None])).flatten().tolist()
    assert metrics["kl"].converted == pytest.approx(np.mean(kl), rel=1e-4)
    assert metrics["top1"].converted == pytest.approx(np.mean(same), rel=1e-6)
    assert metrics["perplexity"].converted == pytest.approx(np.exp(np.mean(own_loss)), rel=1e-4)
    assert metrics["perplexity"].dense == pytest.approx(np.exp(np.mean(dense_loss)), rel=1e-4)
    assert metrics["kl"].samples == 36
    assert metrics["kl"].standard_error > 0


def test_classifiers_are_compared_decision_by_decision():
    config = BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    config.architectures = ["BertForSequenceClassification"]
    dense, other = pair(lambda: BertForSequenceClassification(config))
    metrics = {metric.key: metric for metric in compare(dense, other, rows(9, 5, 12))}
    assert metrics["agreement"].samples == 3
    assert metrics["agreement"].converted in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert {metric.key: metric.converted for metric in compare(dense, dense, rows(9, 5))}["agreement"] == 1


def test_scores_of_one_output_are_ranked_and_measured():
    config = bert_config(num_labels=1, architectures=["BertForSequenceClassification"])
    dense, other = pair(lambda: BertForSequenceClassification(config))
    unseen = rows(9, 5, 12, 7, 3, 8)
    with torch.no_grad():
        wanted, found = (torch.cat([model(row[None]).logits[0] for row in unseen.rows]) for model in (dense, other))
    metrics = {metric.key: metric for metric in compare(dense, other, unseen)}
    error = ((found - wanted).square().mean() / wanted.var(correction=0)).item()
    assert metrics["score_error"].converted == pytest.approx(error, rel=1e-3)
    ranks = [values.argsort().argsort().numpy() for values in (wanted, found)]
    assert metrics["ranking"].converted == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert metrics["ranking"].standard_error > 0
    same = {metric.key: metric.converted for metric in compare(dense, dense, unseen)}
    assert same == {"ranking": pytest.approx(1), "score_error": 0}


def test_equal_values_rank_alike():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert _spearman(values, torch.tensor([5.0, 6.0, 6.0, 7.0])) == pytest.approx(3 / 10**0.5)
    assert _spearman(values, torch.ones(4)) == 0


def test_ranking_of_similarities_is_spearman():
    torch.manual_seed(0)
    dense, own = torch.randn(12, 6), torch.randn(12, 6)
    found = _similarity_ranking(dense, own, "text")
    pairs = [(i, j) for i in range(12) for j in range(i + 1, 12)]
    ranks = []
    for part in (dense, own):
        unit = part / part.norm(dim=1, keepdim=True)
        values = [float(unit[i] @ unit[j]) for i, j in pairs]
        ranks.append([sorted(values).index(value) for value in values])
    assert found.converted == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert _similarity_ranking(dense, 3 * dense, "text").converted == pytest.approx(1)
    assert _similarity_ranking(dense, dense, "text").standard_error == pytest.approx(0, abs=1e-9)


def test_two_of_four_keeps_the_largest():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 5.0, -4.0], [0.0, 0.1, -0.2, 0.3, 1.0, 2.0]])
    expected = torch.tensor([[0.0, -3.0, 2.0, 0.0, 5.0, -4.0], [0.0, 0.0, -0.2, 0.3, 1.0, 2.0]])
    assert torch.equal(keep_two_of_four(weight), expected)


def test_calls_are_made_in_turn():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    latency = interleaved(calls, seconds=0, device="cpu")
    # a warm-up each, then five rounds whose order rotates
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba" + "ab"
    assert latency["a"].samples == 5
    assert interleaved(calls, seconds=60, device="cpu")["b"].samples == MOST_ROUNDS


def test_more_tokens_than_positions_become_rows():
    model = GPT2LMHeadModel(gpt2_config(n_positions=66))
    assert token_batch(model, 1024)["input_ids"].shape == (16, 64)
    assert token_batch(model, 16)["input_ids"].shape == (1, 16)


def timing_row(tokens, dense, converted):
    def latency(middle):
        return Latency(p20=0.9 * middle, p50=middle, p80=1.1 * middle, samples=9)

    return TimingRow(what="forward", tokens=tokens, shape="", dense=latency(dense), converted=latency(converted))


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ((0.5, 0.5, 2, 2), "break-even between 16 and 128 tokens"),
        ((2, 2, 2, 2), "faster at every measured size"),
        ((0.5, 1, 1.05, 1), "not faster at any measured size up to 1024 tokens"),
        ((2, 2, 2, 0.5), "faster only at 1, 16, 128 tokens, not at 1024"),
        # a size in the middle that is not clearly faster moves the point up
        ((2, 1, 2, 2), "break-even between 16 and 128 tokens"),
    ],
)
def test_break_even_is_named(ratios, words):
    sizes = (1, 16, 128, 1024)
    assert words in break_even(tuple(timing_row(n, ratio, 1) for n, ratio in zip(sizes, ratios, strict=True)))


def test_ranges_that_overlap_are_no_difference():
    assert timing_row(1, 1.0, 1.1).verdict == "no clear difference"
    assert timing_row(1, 1.0, 2.0).verdict == "slower"
    assert timing_row(1, 2.0, 1.0).verdict == "faster"
    assert timing_row(1, 2.0, 1.0).ratio == 2


@pytest.mark.parametrize(
    ("own", "other", "higher", "expected"),
    [(0.9, 0.8, True, "better"), (0.9, 0.8, False, "worse"), (0.81, 0.8, True, "level"), (0.8, 0.9, False, "better")],
)
def test_a_difference_within_its_noise_is_level(own, other, higher, expected):
    def metric(value):
        return Metric(
            key="k",
            title="t",
            unit="",
            dense=None,
            converted=value,
            higher_is_better=higher,
            samples=4,
            sample="rows",
            standard_error=0.01,
        )

    assert _outcome(metric(own), metric(other)) == expected


def layer(name):
    return Layer(
        name=name, in_features=8, out_features=8, design="2 stages", dense_parameters=64, parameters=32, dense_flops=128,
        flops=64, error=0.1, baseline_error=0.2, baseline_rank=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"], ["mlp.up_proj"]),
        (["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"], ["fc1 (encoder)", "fc1 (decoder)"]),
        (["encoder.layer.0.output.dense", "pooler.dense"], ["output.dense", "pooler.dense"]),
        (["pooler.dense"], ["pooler.dense"]),
    ],
)
def test_layers_of_every_stack_have_a_cell(names, kinds):
    assert list(dict.fromkeys(_kinds([layer(name) for name in names]).values())) == kinds


def test_every_finetune_is_told_by_itself():
    def run(start, best):
        return FinetuneRecord(
            steps=100, tokens=1, objective="hidden", start_loss=start, best_loss=best, data_sha256="", seed=0, stopped="",
            history=(),
        )  # fmt: skip

    assert _training_sentences((run(0.8, 0.5), run(0.95, 0.95))) == [
        "Finetuning for 100 steps lowered the held-out hidden loss from 0.8 to 0.5.",
        "Finetuning for 100 steps did not lower the held-out hidden loss of 0.95; its start was kept.",
    ]
