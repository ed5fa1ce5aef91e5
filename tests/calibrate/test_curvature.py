"""The measured curvature against what really happens to the model's outputs."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, normalize
from transformers import BertForSequenceClassification, BertModel, GPT2LMHeadModel, LlamaForCausalLM

import spmconvert
from spmconvert.calibrate import curvature as sensitivity
from spmconvert.calibrate.curvature import Curvatures, RowNumbers, gather_curvatures
from spmconvert.data.calibration import load_rows
from spmconvert.errors import CalibrationError
from spmconvert.recipe.recipe import Calibration
from tests.conftest import bert_config, gpt2_config, llama_config

LAYERS = {
    "gpt2": "transformer.h.1.mlp.c_fc",
    "bert": "encoder.layer.1.output.dense",
    "llama": "model.layers.0.mlp.up_proj",
}


def words(model, batch):
    return log_softmax(model(**batch).logits[batch["attention_mask"].bool()], dim=-1)


def means(model, batch):
    states, mask = model(**batch)[0], batch["attention_mask"][..., None]
    return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def divergence(dense, other):
    return kl_div(other, dense, log_target=True, reduction="batchmean")


def squared_distance(dense, other):
    return (dense - other).square().sum(-1).mean()


# the model, one of its layers, what is compared, and how: for words and classes the divergence a position or row, for means
# the squared distance, and for scores half of it, which is the divergence of normal distributions of unit variance
CASES = {
    "gpt2": (lambda: GPT2LMHeadModel(gpt2_config()), LAYERS["gpt2"], words, divergence),
    "llama": (lambda: LlamaForCausalLM(llama_config()), LAYERS["llama"], words, divergence),
    "encoder": (lambda: BertModel(bert_config()), LAYERS["bert"], means, squared_distance),
    "classes": (
        lambda: BertForSequenceClassification(bert_config(num_labels=3)),
        f"bert.{LAYERS['bert']}",
        lambda model, batch: log_softmax(model(**batch).logits, dim=-1),
        divergence,
    ),
    "scores": (
        lambda: BertForSequenceClassification(bert_config(num_labels=1)),
        f"bert.{LAYERS['bert']}",
        lambda model, batch: model(**batch).logits,
        lambda dense, other: squared_distance(dense, other) / 2,
    ),
}


@contextmanager
def noise(module, covariance_root):
    """Add normal noise to a layer's outputs, of its own at every position."""
    handle = module.register_forward_hook(lambda *call: call[2] + torch.randn_like(call[2]) @ covariance_root)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def cost(case, model, batch, covariance_root):
    _, name, compared, distance = CASES[case]
    dense = compared(model, batch)
    with noise(model.get_submodule(name), covariance_root):
        return distance(dense, compared(model, batch)).item()


@pytest.mark.parametrize("case", CASES)
def test_noise_in_a_layers_outputs_costs_what_the_curvature_says(case, monkeypatch):
    # clipping, which changes the curvature on purpose, has a test of its own
    monkeypatch.setattr(sensitivity, "CLIP", 1e9)
    make, name, compared, _ = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    # two rows, one of them padded, so often that chance has no say; of words every position is a sample
    copies = 3_000 if compared is words else 5_000
    ids, mask = torch.randint(3, 90, (2, 3)), torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": ids.repeat(copies, 1), "attention_mask": mask.repeat(copies, 1)}
    curvature = gather_curvatures(model, [name], [batch], seed=1)[name].double()
    model.double()
    half = torch.arange(len(curvature)) < len(curvature) // 2
    for root in (torch.eye(len(curvature)).double(), half.double().diag()):
        predicted = (root.t() @ curvature @ root).trace().item()
        # a cost so small that its third order has no say, either
        size = (1e-9 / predicted) ** 0.5
        assert cost(case, model, batch, size * root) == pytest.approx(1e-9, rel=0.05)


def test_gradients_of_parameters_are_left_alone(checkpoints, text):
    model = spmconvert.load(checkpoints["gpt2"], dtype=torch.float32)
    rows = load_rows(checkpoints["gpt2"], model.config, Calibration(file=text, rows=8), seed=0)
    found = gather_curvatures(model, [LAYERS["gpt2"]], rows.batches(rows.fitted, model), seed=0)
    again = gather_curvatures(model, [LAYERS["gpt2"]], rows.batches(rows.fitted, model), seed=0)
    assert torch.equal(found[LAYERS["gpt2"]], again[LAYERS["gpt2"]])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def caught(grads, name):
    """A hook on a layer that keeps the gradient of its output."""

    def hook(_, __, output):
        output.register_hook(lambda grad: grads.update({name: grad}))

    return hook


@pytest.mark.parametrize("chunk", [1, 7, 100_000])
@pytest.mark.parametrize("size", [1, 3])
def test_heads_in_chunks_and_rows_in_batches_are_one_backward_pass(checkpoints, text, monkeypatch, size, chunk):
    model = spmconvert.load(checkpoints["gpt2"], dtype=torch.float32).eval()
    rows = load_rows(checkpoints["gpt2"], model.config, Calibration(file=text, rows=6, batch_size=size), seed=0)
    names = [LAYERS["gpt2"], "transformer.h.0.attn.c_proj"]
    batches = list(rows.batches(rows.fitted, model))
    monkeypatch.setattr(sensitivity, "DRAWN_POSITIONS", chunk)
    curvatures = Curvatures(model, names, seed=2)
    for batch in batches:
        curvatures.add(batch)
    found = curvatures.result()
    # words drawn alike, from all logits at once
    sums, positions = dict.fromkeys(names, 0.0), 0
    for number, batch in enumerate(batches):
        grads = {}
        handles = [model.get_submodule(name).register_forward_hook(caught(grads, name)) for name in names]
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
        chances = log_softmax(model(**batch).logits[mask], dim=-1)
        numbers = RowNumbers(2, number * size).uniform(mask.nonzero()[:, 0])
        chosen = sensitivity._drawn(chances.detach(), numbers)
        chances.gather(-1, chosen).sum().backward()
        for handle in handles:
            handle.remove()
        for name in names:
            gradient = grads[name][mask]
            norms = gradient.norm(dim=1, keepdim=True)
            clipped = gradient * (sensitivity.CLIP * norms[norms > 0].median() / norms.clamp_min(1e-30)).clamp_max(1.0)
            sums[name] = sums[name] + clipped.t() @ clipped
        positions += len(chosen)
    for name in names:
        expected = sums[name] / (2 * positions)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_layer_without_influence_is_named(checkpoints, text):
    model = spmconvert.load(checkpoints["gpt2"], dtype=torch.float32)
    rows = load_rows(checkpoints["gpt2"], model.config, Calibration(file=text, rows=8), seed=0)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.zero_()
    with pytest.raises(CalibrationError, match=r"h\.1\.mlp\.c_fc has no influence .*--ignore"):
        gather_curvatures(model, [LAYERS["gpt2"]], rows.batches(rows.fitted, model), seed=0)


def test_no_position_counts_for_more_than_a_few(checkpoints, text, monkeypatch):
    model = spmconvert.load(checkpoints["llama"], dtype=torch.float32)
    rows = load_rows(checkpoints["llama"], model.config, Calibration(file=text, rows=8), seed=0)
    layer = LAYERS["llama"]
    traces = []
    for clip in (1e-3, 1.0, 1e9, 1e12):
        monkeypatch.setattr(sensitivity, "CLIP", clip)
        found = gather_curvatures(model, [layer], rows.batches(rows.fitted, model), seed=0)
        traces.append(found[layer].trace().item())
    assert traces[0] < 1e-4 * traces[1]
    assert traces[1] < 0.99 * traces[2]
    assert traces[2] == traces[3], "nothing is made longer"
