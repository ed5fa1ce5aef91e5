"""Pooling as sentence-transformers does it, with padding on either side."""

import json

import pytest
import torch

from spmconvert.errors import CheckpointError
from spmconvert.exporting.sentences import POOLING_FLAGS, Pooling, pooling_modes

STATES = torch.arange(24.0).view(2, 4, 3) - 7
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])


def rows(mode):
    """By a loop over the real tokens."""
    found = []
    for states, mask in zip(STATES, MASK, strict=True):
        places = mask.nonzero().flatten()
        real = states[places]
        weights = torch.arange(1.0, len(real) + 1)[:, None]
        found.append(
            {
                "cls": real[0],
                "max": real.amax(0),
                "mean": real.mean(0),
                "mean_sqrt_len_tokens": real.sum(0) / len(real) ** 0.5,
                "weightedmean": (real * weights).sum(0) / weights.sum(),
                "lasttoken": real[-1],
            }[mode]
        )
    return torch.stack(found)


@pytest.mark.parametrize("mode", POOLING_FLAGS.values())
def test_every_way_of_pooling(mode):
    assert torch.allclose(Pooling((mode,))(STATES, MASK), rows(mode))


@pytest.mark.parametrize("mode", POOLING_FLAGS.values())
def test_it_is_what_sentence_transformers_does(mode):
    """That package is no dependency: where it is missing this says so."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    features = {"token_embeddings": STATES, "attention_mask": MASK}
    assert torch.allclose(Theirs(3, pooling_mode=mode)(features)["sentence_embedding"], Pooling((mode,))(STATES, MASK))


def test_several_are_joined():
    assert torch.allclose(Pooling(("cls", "mean"))(STATES, MASK), torch.cat([rows("cls"), rows("mean")], dim=1))


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ("cls", "mean")),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["max", "mean"]}, ("max", "mean")),
        ({"word_embedding_dimension": 3}, ("mean",)),
    ],
)
def test_either_layout_of_the_config_is_read(tmp_path, config, modes):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pooling_modes(tmp_path / "config.json") == modes


def test_unknown_ways_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"pooling_mode": "median"}')
    with pytest.raises(CheckpointError, match="median"):
        pooling_modes(tmp_path / "config.json")
