"""The student of a finetune: without dropout in any of its towers."""

import pytest
import torch
from transformers import BertConfig, CLIPTextConfig, LlamaConfig, LlavaConfig

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
    assert student.training
    ids = torch.arange(3, 23)[None]
    first, second = (student(input_ids=ids)[0] for _ in range(2))
    assert torch.equal(first, second)
