"""The student of a finetune: without what models do in training mode alone, in any of its towers."""

import pytest
import torch
from transformers import (
    BertConfig,
    CLIPTextConfig,
    LlamaConfig,
    LlavaConfig,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
)

import spmconvert
from spmconvert import SPMLinear
from spmconvert.checkpoint.converted import open_converted
from spmconvert.distill.models import load_student, turn_dropout_off_
from spmconvert.recipe.recipe import Training


def test_dropout_of_towers_is_off():
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "attention_dropout": 0.3},
        text_config=LlamaConfig(attention_dropout=0.2),
    )
    turn_dropout_off_(config)
    assert config.text_config.attention_dropout == 0
    assert config.vision_config.attention_dropout == 0
    for other in (BertConfig(hidden_dropout_prob=0.4), CLIPTextConfig(attention_dropout=0.1)):
        turn_dropout_off_(other)
        assert not any(value for key, value in other.to_dict().items() if "drop" in key)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_student_that_recomputes_has_no_dropout(converted, name):
    training = Training(gradient_checkpointing=True)
    student = load_student(open_converted(converted[name]), training, torch.device("cpu"))
    ids = torch.arange(3, 23)[None]
    assert recomputed(student, input_ids=ids)
    first, second = (student(input_ids=ids)[0] for _ in range(2))
    assert torch.equal(first, second)


def recomputed(student, **batch):
    """How many times blocks ran a second time for their gradients."""
    calls = []
    layer = next(module for module in student.modules() if isinstance(module, SPMLinear))
    with torch.no_grad():
        student(**batch)
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    output = student(**batch)[0]
    once = len(calls)
    output.sum().backward()
    handle.remove()
    return len(calls) - once


def test_a_student_that_recomputes_masks_no_sound_and_takes_no_numbers_of_a_batch(tmp_path):
    """What models do in training mode beside dropout: the student is as it runs for a user, bit by bit."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    waves = {"conv_dim": (16, 16), "conv_stride": (32, 16), "conv_kernel": (32, 16), "num_feat_extract_layers": 2}
    config = Wav2Vec2ConformerConfig(
        **sizes, **waves, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, mask_time_prob=0.5, mask_time_length=2
    )
    Wav2Vec2ConformerModel(config).save_pretrained(tmp_path / "s")
    spmconvert.convert(tmp_path / "s", tmp_path / "o", targets="mlp", stages=0, rank=4, calib=None)
    training = Training(gradient_checkpointing=True)
    student = load_student(open_converted(tmp_path / "o"), training, torch.device("cpu"))
    sound = torch.randn(2, 16000)
    assert recomputed(student, input_values=sound)
    wanted = spmconvert.load(tmp_path / "o").eval()(sound)[0]
    torch.testing.assert_close(student(sound)[0], wanted)
