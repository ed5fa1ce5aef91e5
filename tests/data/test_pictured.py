"""Pictures with a text beside each, for models that read both."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import spmconvert
from spmconvert.checkpoint.converted import open_converted
from spmconvert.commands.finetune import finetune
from spmconvert.commands.report import report
from spmconvert.data import media, pictured
from spmconvert.data.media import folder_inputs, media_batch, media_rows
from spmconvert.data.standin import stand_in
from spmconvert.model.architecture import load_config, skeleton
from spmconvert.model.towers import beyond_text
from tests.conftest import _tokenizer, llama_config
from tests.support import QUICK, SHORT

EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}


def tokenizer_of_both():
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A tiny LLaVA with its processor."""
    directory = tmp_path_factory.mktemp("pictured") / "llava"
    torch.manual_seed(0)
    tokenizer = tokenizer_of_both()
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        text_config=llama_config(vocab_size=image + 1, max_position_embeddings=512),
        vision_config={"model_type": "clip_vision_model", **EYES, "patch_size": 8},
        image_token_index=image,
        pad_token_id=1,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(directory)
    looks = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.LlavaProcessor(
        looks, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def albums(tmp_path_factory):
    """Three folders of pictures: to fit, to train and to measure on."""
    generator, folders = np.random.default_rng(0), {}
    for name, count in (("fit", 40), ("train", 40), ("measure", 12)):
        folders[name] = tmp_path_factory.mktemp("albums") / name
        folders[name].mkdir()
        for number in range(count):
            pixels = generator.integers(0, 255, (12, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((60, 40)).save(folders[name] / f"{number}.png")
    return folders


def test_pictures_and_words_go_into_a_model_together(llava, albums):
    config = load_config(llava)
    rows = media_rows(folder_inputs(albums["measure"], llava, config), config)
    assert len(rows) == 12
    assert rows[0].tensors["pixel_values"].shape == (3, 16, 16)
    assert not rows[0].tensors["input_ids"].equal(rows[1].tensors["input_ids"])
    assert (rows[0].tensors["input_ids"] == config.image_token_id).sum() == 4
    model = spmconvert.load(llava).eval()
    batch = media_batch(rows[:3], model)
    with torch.no_grad():
        together = model(**batch).logits
        changed = model(**{**batch, "pixel_values": batch["pixel_values"].flip(0)}).logits
    assert not torch.allclose(together, changed)


def test_a_model_that_reads_both_is_converted_trained_and_reported_on_pictures(llava, albums, tmp_path):
    # the features of its last block but one are what LLaVA takes of CLIP
    options = {**QUICK, "calib": albums["fit"], "keep": 0.5, "allow_slower": True}
    conversion = spmconvert.convert(llava, tmp_path / "o", targets="mlp", ignore="*.encoder.layers.1.*", **options)
    places = {record.name.split(".layers")[0] for record in conversion.layers}
    assert places == {"model.language_model", "model.vision_tower.encoder"}
    trained = finetune(tmp_path / "o", tmp_path / "t", data=albums["train"], **{**SHORT, "steps": 4})
    assert trained.best_loss <= trained.start_loss
    found = report(tmp_path / "t", data=albums["measure"], seconds=0.01, rows=8)
    assert {metric.key for metric in found.quality[0].metrics} >= {"kl"}
    assert found.generations
    assert found.timing


def test_layers_without_influence_are_named_together(llava, albums, tmp_path):
    options = {**QUICK, "calib": albums["fit"], "keep": 0.5, "allow_slower": True}
    with pytest.raises(spmconvert.errors.CalibrationError, match=r"2 layers, .* --ignore .*layers\.1\.mlp\.fc1,.*fc2,"):
        spmconvert.convert(llava, tmp_path / "o", targets="mlp", **options)


def test_patches_without_an_axis_of_items_are_joined():
    patches = torch.arange(24.0).view(2, 6, 2)
    grid = torch.tensor([[1, 2, 3], [1, 2, 3]])
    batch = pictured.joined({"pixel_values": patches, pictured.GRID: grid})
    assert batch["pixel_values"].shape == (12, 2)
    assert batch[pictured.GRID].equal(grid)
    alone = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    assert pictured.joined(alone) is alone


def test_a_chat_model_is_asked_in_its_own_form(llava, albums, tmp_path):
    processor = transformers.AutoProcessor.from_pretrained(llava)
    processor.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    picture = np.zeros((20, 20, 3), dtype=np.uint8)
    found = pictured.pictured([picture], 0, "calibration", processor, llava, load_config(llava))
    words = processor.tokenizer.decode(found["input_ids"][0])
    assert words.replace(" ", "").startswith("[user]<image>")
    assert "[assistant]" in words.replace(" ", "")


def test_a_processor_that_fails_is_named(llava, albums, tmp_path):
    for name in ("config.json", "processor_config.json"):
        shutil.copy(llava / name, tmp_path / name)
    with pytest.raises(spmconvert.errors.CalibrationError, match="no processor for pictures with text that can be used"):
        folder_inputs(albums["measure"], tmp_path, load_config(tmp_path))


def test_pictures_are_made_up_where_a_converted_layer_sees_them(run, llava, tmp_path, monkeypatch):
    """Calibration, training, measuring and the comparison of an export, without a file."""
    monkeypatch.setattr(media, "COUNTS", {"calibration": 40, "training": 24, "evaluation": 12})
    quick = ["--refine", "0", "--set", "fit.iterations=2", "--structures", "lowrank", "--keep", "0.5", "--allow-slower"]
    monkeypatch.chdir(tmp_path)
    ignored = ["--ignore", "*.encoder.layers.1.*"]
    code, _, err = run("convert", llava, "-o", "o", "--targets", "text:mlp,vision:mlp", *ignored, *quick)
    assert code == 0, err
    assert "calibrated on made-up pictures, each beside prose" in err
    record = json.loads((tmp_path / "o" / "spm.json").read_text())
    assert {layer["name"].split(".")[1] for layer in record["layers"]} == {"language_model", "vision_tower"}
    code, _, err = run("finetune", "o", "--steps", "2", "--batch-size", "2")
    assert code == 0, err
    assert "trained on made-up pictures, each beside prose" in err
    found = report(tmp_path / "o-ft", data="auto", rows=4, seconds=0.01)
    assert found.quality[0].text.startswith("made-up pictures")
    exported = spmconvert.export(tmp_path / "o-ft", tmp_path / "dense")
    assert exported.compared == "first one on pixel_values of 2 x 3 x 16 x 16"
    assert exported.difference is not None


def test_text_alone_where_no_converted_layer_sees_pictures(run, llava, tmp_path):
    quick = ["--refine", "0", "--rank", "4", "--stages", "0", "--set", "calibration.rows=8"]
    code, _, err = run("convert", llava, "-o", tmp_path / "o", "--targets", "mlp", *quick)
    assert code == 0, err
    assert "the model writes itself; without pictures, as text reaches all that is converted; a text like" in err
    found = stand_in("training", llava, load_config(llava), open_converted(tmp_path / "o").layers)
    assert found.file.suffix == ".txt"


def test_pictures_without_a_processor_are_said_to_be_missing(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "s")
    (tmp_path / "s" / "processor_config.json").unlink()
    found = stand_in(
        "training", tmp_path / "s", load_config(tmp_path / "s"), ["model.vision_tower.encoder.layers.0.mlp.fc1"]
    )
    assert found.file.suffix == ".txt"
    assert "without pictures, for want of a processor" in found.better


def test_what_text_alone_does_not_run(llava):
    model = skeleton(load_config(llava))
    beyond = ("model.vision_tower.encoder.layers.0.mlp.fc1", "model.multi_modal_projector.linear_1")
    assert all(beyond_text(model, [name]) for name in beyond)
    assert not beyond_text(model, ["model.language_model.layers.0.mlp.up_proj", "lm_head"])


def test_a_finetune_of_an_unconverted_state_has_no_loss(llava, albums, tmp_path):
    """With dropout in both towers, and blocks that are recomputed: layers of full rank are the dense ones."""
    shutil.copytree(llava, tmp_path / "s")
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["attention_dropout"] = 0.5
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    options = {**QUICK, "stages": 0, "rank": 32, "allow_growth": True}
    spmconvert.convert(tmp_path / "s", tmp_path / "o", targets="mlp", **options)
    short = {**SHORT, "steps": 2, "evaluate_every": 1, "learning_rate": 1e-9, "gradient_checkpointing": True}
    tuned = finetune(tmp_path / "o", tmp_path / "t", data=albums["train"], **short)
    curve = json.loads((tmp_path / "t" / "spm.json").read_text())["finetune"][-1]["curve"]
    assert len(curve) == 2, tuned.stopped
    assert max(tuned.start_loss, *curve) < 1e-6
