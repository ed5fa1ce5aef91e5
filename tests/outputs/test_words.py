"""Words of two models, compared from their hidden states on, also where pictures belong to some of the tokens."""

import copy

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from spmconvert.distill.loss import Distillation
from spmconvert.outputs import words
from spmconvert.outputs.words import compare_words, has_plain_head, word_states
from spmconvert.recipe.recipe import Training

PICTURE = 5
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**TOWER, "num_key_value_heads": 1, "vocab_size": 96, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}


def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=PICTURE,
        vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), torch.randn(2, 3, 16, 16)


def idefics():
    config = Idefics3Config(
        vision_config=VISION, text_config=LlamaConfig(**TEXT), image_token_id=PICTURE, scale_factor=1, pad_token_id=1
    )
    return Idefics3ForConditionalGeneration(config), torch.randn(2, 1, 3, 16, 16)


@pytest.mark.parametrize("build", [llava, idefics])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_of_pictures_and_words_is_compared_by_its_words(build):
    torch.manual_seed(0)
    teacher, pixels = build()
    teacher.eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "mlp" in name and "vision" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.full((2, 12), 7)
    # as many as the patches of a picture, and beyond the first tokens of the row
    ids[:, 6:10] = PICTURE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "use_cache": False}
    distillation = Distillation(student, teacher, "logits", Training())
    loss = distillation.loss(batch, measure=True)
    logits = [model(**batch).logits.detach().flatten(0, 1).log_softmax(-1) for model in (student, teacher)]
    assert distillation.plain_head
    assert loss.positions == 24
    expected = kl_div(*logits, reduction="sum", log_target=True)
    assert expected > 0.01
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_does_not_call_its_base_model_is_not_plain():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32)).eval()
    batch = {"input_ids": torch.arange(3, 12)[None]}
    assert not has_plain_head(model, batch)
    assert word_states(model, model, batch, plain_head=False)[0].shape == (1, 9, 64)


def test_few_logits_are_kept_and_more_are_computed_again_to_the_same_gradients(monkeypatch):
    torch.manual_seed(0)
    states, targets = torch.randn(300, 8, requires_grad=True), torch.randn(300, 8)
    head, target_head = torch.nn.Linear(8, 30), torch.nn.Linear(8, 30)
    found, calls = [], []
    head.register_forward_hook(lambda *arguments: calls.append(len(arguments[-1])))
    for most, expected in ((300 * 30, 300), (300 * 30 - 1, 2 * 300)):
        monkeypatch.setattr(words, "KEPT_LOGITS", most)
        calls.clear()
        divergence = compare_words(states, head, (targets,), target_head)[0]
        found.append((divergence, *torch.autograd.grad(divergence, [states, head.weight])))
        assert sum(calls) == expected
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(kept, again)
