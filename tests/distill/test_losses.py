"""Losses against their definitions, and the chunked form against the plain one."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from spmconvert.distill import losses
from spmconvert.distill.losses import Distillation, chunked_kl, hidden_state_loss, kl_divergence, objective_for


def test_kl_is_the_definition():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = (p * (p / q).log()).sum() * 4
    torch.testing.assert_close(kl_divergence(student, teacher, 2.0), expected)
    assert kl_divergence(teacher, teacher, 1.0).abs() < 1e-5


@pytest.mark.parametrize("tokens", [1, 10, 600])
def test_chunked_kl_equals_plain(tokens):
    torch.manual_seed(0)
    own_head, head = torch.nn.Linear(8, 30), torch.nn.Linear(8, 30)
    own, target = torch.randn(tokens, 8, requires_grad=True), torch.randn(tokens, 8)
    plain = kl_divergence(own_head(own), head(target), 1.5)
    chunked = chunked_kl((own, own_head), (target, head), 1.5)
    torch.testing.assert_close(chunked, plain)
    inputs = [own, own_head.weight]
    for found, expected in zip(torch.autograd.grad(chunked, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_chunks_never_hold_all_logits(monkeypatch):
    sizes = []
    original = losses.kl_divergence

    def watched(student, teacher, temperature):
        sizes.append(len(student))
        return original(student, teacher, temperature)

    monkeypatch.setattr(losses, "kl_divergence", watched)
    head = torch.nn.Linear(4, 9)
    chunked_kl((torch.randn(1000, 4, requires_grad=True), head), (torch.randn(1000, 4), head), 1.0).backward()
    assert max(sizes) == losses.CHUNK_TOKENS
    assert sum(sizes) == 2 * 1000, "each chunk is computed once forward and once more for the backward"


def test_hidden_state_loss():
    x = torch.randn(6, 5)
    assert hidden_state_loss(x, x) < 1e-5
    assert hidden_state_loss(2 * x, x) == pytest.approx((x.square().mean(-1) / x.square().mean()).sum().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "objective"),
    [
        ("GPT2LMHeadModel", "logits"),
        ("LlamaForCausalLM", "logits"),
        ("BertForMaskedLM", "logits"),
        ("T5ForConditionalGeneration", "logits"),
        ("BertForSequenceClassification", "classes"),
        ("ViTForImageClassification", "classes"),
        ("BertModel", "hidden"),
    ],
)
def test_objective_follows_the_architecture(architecture, objective):
    assert objective_for(type("Config", (), {"architectures": [architecture]})()) == objective


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_plain_head_is_recognised_and_gives_the_same_loss(checkpoints, name):
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(checkpoints[name]).eval().requires_grad_(False)
    student = AutoModelForCausalLM.from_pretrained(checkpoints[name]).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = {
        "input_ids": torch.arange(3, 23).view(2, 10),
        "attention_mask": torch.ones(2, 10, dtype=torch.long),
        "use_cache": False,
    }
    batch["attention_mask"][1, 6:] = 0
    chunked, plain = Distillation(student, teacher, "logits"), Distillation(student, teacher, "logits", headless=False)
    (found, count), (expected, also) = chunked.loss(batch), plain.loss(batch)
    assert chunked.headless
    assert count == also == 16
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_capped_logits_are_not_taken_for_a_plain_head():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        vocab_size=40, final_logit_softcapping=0.5, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
    distillation = Distillation(model, model, "logits")
    ids = torch.arange(1, 9)[None]
    distillation.loss({"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})
    assert distillation.headless is False
