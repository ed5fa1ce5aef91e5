"""Models on random tokens: which take them, and what those answer that want more."""

import pytest
import torch
from transformers import BrosConfig, BrosModel, CanineConfig, CanineModel

from spmconvert.data.tokens import reads_tokens
from spmconvert.errors import CheckpointError
from spmconvert.outputs.probe import first_output, token_batch

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize("architecture", ["BarkModel", "Blip2QFormerModel", "BlipForQuestionAnswering", "Glm4vVisionModel"])
def test_models_that_need_more_than_tokens(architecture):
    config = BrosConfig()
    config.architectures = [architecture]
    assert not reads_tokens(config)


def test_characters_without_a_table():
    model = CanineModel(CanineConfig(**SIZES)).eval()
    ids = token_batch(model, 16)["input_ids"]
    assert ids.max() < 256
    assert first_output(model, ids).isfinite().all()


def test_what_is_missing_is_named():
    model = BrosModel(BrosConfig(**SIZES, vocab_size=50)).eval()
    with pytest.raises(CheckpointError, match="BrosModel does not run on tokens alone: You have to specify bbox"):
        first_output(model, torch.tensor([[1, 2]]))
