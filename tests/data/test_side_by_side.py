"""Towers side by side: both are calibrated, trained and measured in one run on a text and a picture."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import spmconvert
from spmconvert.commands.report import report
from spmconvert.data import media
from spmconvert.data.media import made_up, media_batch, media_rows
from spmconvert.data.standin import stand_in
from spmconvert.model.architecture import load_config
from spmconvert.outputs.objective import first_states
from tests.conftest import _tokenizer
from tests.support import QUICK, SHORT

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LOOKS = {"size": {"height": 16, "width": 16}}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(media, "COUNTS", {"calibration": 40, "training": 24, "evaluation": 12})


@pytest.fixture(scope="module", params=["clip", "siglip"])
def pair(request, tmp_path_factory):
    """A tiny CLIP or SigLIP with its processor."""
    directory = tmp_path_factory.mktemp("pairs") / request.param
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "pad_token_id": 1}
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    if request.param == "clip":
        text |= {"eos_token_id": tokenizer.eos_token_id}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(crop_size=LOOKS["size"], **LOOKS), tokenizer)
    else:
        text |= {"projection_size": 32}
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        processor = transformers.SiglipProcessor(transformers.SiglipImageProcessor(**LOOKS), tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def test_what_both_towers_say_follows_from_the_text_and_the_picture(pair):
    config = load_config(pair)
    assert stand_in("calibration", pair, config).what == "made-up pictures with text"
    model = spmconvert.load(pair).eval()
    batch = media_batch(media_rows(made_up("evaluation", pair, config), config)[:3], model)
    assert batch["input_ids"].shape == (3, 24)
    with torch.no_grad():
        both = first_states(model(**batch))
        other = first_states(model(**{**batch, "pixel_values": batch["pixel_values"].flip(0)}))
    assert both.shape[:2] == (3, 2)
    torch.testing.assert_close(other[:, 0], both[:, 0])
    torch.testing.assert_close(other[:, 1], both[:, 1].flip(0), rtol=1e-4, atol=1e-5)


def test_towers_are_converted_trained_and_reported_on_both(pair, tmp_path):
    errors = {}
    for calib in ("auto", None):
        made = spmconvert.convert(pair, tmp_path / str(calib), targets="mlp", stages=0, rank=12, calib=calib, **QUICK)
        assert {record.name.partition(".")[0] for record in made.layers} == {"text_model", "vision_model"}
        found = report(tmp_path / str(calib), data="auto", rows=12, seconds=0.01)
        ranking, cosine = found.quality[0].metrics
        assert ranking.title == "ranking of text and picture similarities (Spearman)"
        # of made-up items some were calibrated with
        assert ranking.samples == 12**2
        errors[calib] = 1 - cosine.converted
        assert found.timing
    assert errors["auto"] < errors[None]
    # what was fitted without data has most to learn, and half of the rows say so whatever the draw
    rows = {"held_out": 0.5, "evaluation_rows": 64}
    tuned = spmconvert.finetune(tmp_path / "None", tmp_path / "ft", **{**SHORT, **rows})
    assert tuned.best_loss < tuned.start_loss
    exported = spmconvert.export(tmp_path / "ft", tmp_path / "dense")
    assert exported.difference is not None


def test_a_model_ranks_as_it_ranks_itself(pair, tmp_path):
    spmconvert.convert(pair, tmp_path / "o", targets="mlp", stages=0, rank=32, allow_growth=True)
    ranking, cosine = report(tmp_path / "o", data="auto", rows=6, seconds=0).quality[0].metrics
    assert ranking.converted == pytest.approx(1, abs=1e-3)
    assert cosine.converted == pytest.approx(1, abs=1e-5)


def test_a_folder_of_pictures_is_read_beside_prose(pair, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    options = {**QUICK, "stages": 0, "rank": 12}
    assert spmconvert.convert(pair, tmp_path / "o", targets="mlp", calib=folder, **options).fitted_rows
