"""The loss of a student against its teacher: by architecture, chunked or not, with its parts, on real positions only."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from spmconvert.distill.loss import Distillation
from spmconvert.outputs.losses import hidden_state_loss, kl_divergence
from spmconvert.outputs.objective import objective_for
from spmconvert.outputs.words import has_plain_head
from spmconvert.recipe.recipe import Training
from tests.conftest import bert_config


@pytest.mark.parametrize(
    ("architecture", "objective"),
    [
        ("GPT2LMHeadModel", "logits"),
        ("LlamaForCausalLM", "logits"),
        ("BertForMaskedLM", "logits"),
        ("T5ForConditionalGeneration", "logits"),
        ("BertForSequenceClassification", "classes"),
        ("ViTForImageClassification", "classes"),
        ("BertForQuestionAnswering", "classes"),
        ("BertModel", "hidden"),
    ],
)
def test_objective_follows_the_architecture(architecture, objective):
    assert objective_for(type("Config", (), {"architectures": [architecture]})()) == objective


def test_a_classifier_of_one_output_has_scores():
    for architecture, objective in (("BertForSequenceClassification", "scores"), ("BertModel", "hidden")):
        config = bert_config(num_labels=1, architectures=[architecture])
        assert objective_for(config) == objective


def token_batch(rows=2, tokens=10, real=6):
    ids = torch.arange(3, 3 + rows * tokens).view(rows, tokens)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[1, real:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pair(make, noise=0.02):
    torch.manual_seed(0)
    teacher = make().eval().requires_grad_(False)
    student = make().eval()
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return student, teacher


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_plain_head_is_recognised_and_gives_the_same_loss(checkpoints, name):
    student, teacher = pair(lambda: AutoModelForCausalLM.from_pretrained(checkpoints[name]))
    batch = {**token_batch(), "use_cache": False}
    chunked, plain = (Distillation(student, teacher, "logits", Training()) for _ in range(2))
    plain.plain_head = False
    found, expected = chunked.loss(batch, measure=True), plain.loss(batch, measure=True)
    assert chunked.plain_head
    assert found.positions == expected.positions == 16
    torch.testing.assert_close(found.total, expected.total, rtol=1e-4, atol=1e-4)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        own, target = student(**batch).logits, teacher(**batch).logits
    torch.testing.assert_close(found.total, kl_divergence(own[real], target[real], 1.0), rtol=1e-4, atol=1e-4)
    answered = torch.cat([own[0, :-1], own[1, :5]]).log_softmax(-1)
    words = torch.cat([batch["input_ids"][0, 1:], batch["input_ids"][1, 1:6]])
    entropy = -answered.gather(-1, words[:, None]).sum()
    torch.testing.assert_close(found.parts["cross_entropy"], entropy, rtol=1e-4, atol=1e-4)
    assert found.parts["words"] == len(words)


def test_capped_logits_are_not_taken_for_a_plain_head():
    config = Gemma2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        vocab_size=40, final_logit_softcapping=0.5, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
    ids = torch.arange(1, 9)[None]
    assert not has_plain_head(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})


def masked_batch():
    batch = token_batch()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 2] = 7
    return {**batch, "labels": labels}


def t5():
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0)
    )


def whisper():
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
            max_source_positions=10, max_target_positions=12,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )  # fmt: skip


def vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes))


CASES = {
    "masked": (lambda: BertForMaskedLM(bert_config()), masked_batch, 16),
    "encoder": (lambda: BertModel(bert_config()), token_batch, 16),
    "classifier": (lambda: BertForSequenceClassification(bert_config(num_labels=3)), token_batch, 2),
    "regression": (lambda: BertForSequenceClassification(bert_config(num_labels=1)), token_batch, 2),
    "tagger": (lambda: BertForTokenClassification(bert_config(num_labels=3)), token_batch, 16),
    "answers": (lambda: BertForQuestionAnswering(bert_config()), token_batch, 4),
    "encoder-decoder": (t5, lambda: {**token_batch(), "decoder_input_ids": token_batch()["input_ids"]}, 16),
    "image": (vit, lambda: {"pixel_values": torch.randn(2, 3, 8, 8)}, 10),
    "sound": (
        whisper,
        lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])},
        6,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_model(case):
    make, batch, positions = CASES[case]
    student, teacher = pair(make)
    student.config.architectures = [type(student).__name__]
    objective = objective_for(student.config)
    training = Training(hidden_states=0.5, cross_entropy=0.1)
    loss = Distillation(student, teacher, objective, training).loss(batch(), measure=True)
    assert loss.positions == positions
    assert loss.total > 0
    loss.total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    same = Distillation(teacher, teacher, objective, Training(hidden_states=0.5)).loss(batch())
    assert same.total.abs() < 1e-3, "a teacher has nothing to learn from itself"


@pytest.mark.parametrize("case", ["masked", "encoder", "tagger"])
def test_padding_does_not_count(case):
    make, batch, _ = CASES[case]
    student, teacher = pair(make)
    objective = objective_for(type("Config", (), {"architectures": [type(student).__name__]})())
    distillation = Distillation(student, teacher, objective, Training())
    changed = batch()
    changed["input_ids"][1, 6:] = 1
    torch.testing.assert_close(distillation.loss(batch()).total, distillation.loss(changed).total)


def test_layer_outputs_are_matched_where_named():
    student, teacher = pair(lambda: BertModel(bert_config()))
    name = "encoder.layer.1.output.dense"
    distillation = Distillation(student, teacher, "hidden", Training(layer_outputs=2.0), (name,))
    batch = token_batch()
    loss = distillation.loss(batch)
    plain = Distillation(student, teacher, "hidden", Training()).loss(batch)
    torch.testing.assert_close(loss.total - plain.total, 2 * loss.parts["layer_outputs"], rtol=1e-4, atol=1e-4)
    assert loss.parts["layer_outputs"] > 0


def test_pooled_states_are_means_of_real_positions():
    student, teacher = pair(lambda: BertModel(bert_config()))
    batch = token_batch()
    loss = Distillation(student, teacher, "hidden", Training(pooled_states=3.0)).loss(batch)
    plain = Distillation(student, teacher, "hidden", Training()).loss(batch)
    with torch.no_grad():
        states = [model(**batch)[0] for model in (student, teacher)]
    own, target = (torch.stack([state[0].mean(0), state[1, :6].mean(0)]) for state in states)
    expected = hidden_state_loss(own, target) / 2 * 16
    torch.testing.assert_close(loss.parts["pooled_states"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.total - plain.total, 3 * expected, rtol=1e-3, atol=1e-3)
