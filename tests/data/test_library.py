"""The text that stands in where none is given: prose and docstrings, no paragraph of which is in two parts."""

import sysconfig
from pathlib import Path

import pytest
from transformers import CLIPConfig, GPT2Config, LlavaConfig, ViTConfig, WhisperConfig

from spmconvert.data import library
from spmconvert.data.calibration import calibration_rows
from spmconvert.data.documents import read_documents
from spmconvert.data.library import SHARES, library_text, prose
from spmconvert.data.tokens import reads_text
from spmconvert.errors import CalibrationError
from spmconvert.model.architecture import load_config
from spmconvert.recipe.loading import recipe_from_keywords
from spmconvert.system.files import file_hash


@pytest.fixture(scope="module")
def texts():
    return library._texts()


def test_parts_share_no_paragraph(texts):
    assert set(texts) == {"calibration", "evaluation", "training", "code"}
    parts = [set(texts[name]) for name in ("calibration", "evaluation", "training")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == sum(len(texts[name]) for name in texts if name != "code")
    # 320 rows of 128 tokens, of about four characters each
    assert sum(map(len, texts["calibration"])) > 320 * 128 * 4


def test_it_is_prose_of_the_library_and_of_this_project(texts):
    paragraphs = [line for name in dict.fromkeys(SHARES) for line in texts[name]]
    assert not any("\n" in line or ">>>" in line or len(line) < 64 for line in paragraphs)
    own = set(prose())
    assert own < set(paragraphs)
    assert len(paragraphs) - len(own) == len(own) // 4
    installed = " ".join(line for line in texts["training"] if line not in own)
    assert "torch" not in installed.lower()
    # from the language reference
    assert any("expression" in line and "evaluat" in line for line in paragraphs)
    # every part has its share of both
    shares = [len(own & set(texts[name])) / len(own) for name in dict.fromkeys(SHARES)]
    assert shares == pytest.approx([3 / 8, 1 / 8, 1 / 2], abs=0.05)
    foreign = set((library.PROSE / library.FOREIGN).read_text(encoding="utf-8").splitlines())
    assert len(foreign) > 200
    assert foreign < set(texts["calibration"]) | set(texts["training"]), "nothing is measured on other languages"


def test_prose_is_as_it_has_to_be_read():
    lines = prose()
    assert len(lines) == len(set(lines)) > 1500
    assert sum(map(len, lines)) > 750_000
    for line in lines:
        assert 100 < len(line) < 1200, line
        # whatever reads lines finds the same ones, and whatever strips them changes nothing
        assert line.splitlines() == [line.strip()], line
        assert "  " not in line, line
        assert line.replace("\N{NO-BREAK SPACE}", " ").isprintable(), line


def test_it_is_written_once(tmp_path, monkeypatch, texts):
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "_texts", lambda: texts)
    file = library_text("calibration")
    assert file.parent == tmp_path / "texts"
    assert read_documents(file) == texts["calibration"]
    monkeypatch.setattr(library, "_texts", lambda: pytest.fail("collected twice"))
    assert library_text("calibration") == file
    assert read_documents(library_text("evaluation")) == texts["evaluation"]
    monkeypatch.setattr(library, "TEXT_VERSION", 0)
    with pytest.raises(pytest.fail.Exception):
        library_text("calibration")


def test_a_library_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    Path(tmp_path / "broken.py").write_text("def (", encoding="utf-8")
    with pytest.raises(CalibrationError, match="no sources with docstrings"):
        library_text("training")


def test_a_model_that_is_converted_in_memory_is_calibrated_on_it(checkpoints):
    recipe = recipe_from_keywords({"calib": "auto", "calibration.rows": 4})
    rows = calibration_rows(checkpoints["gpt2"], load_config(checkpoints["gpt2"]), recipe)
    assert rows.file_sha256 == file_hash(library_text("calibration"))
    assert len(rows.fitted) == 4


def test_models_that_cannot_be_run_on_text_alone_get_none(checkpoints):
    tokenizer = checkpoints["gpt2"]
    configs = {
        "gpt2": GPT2Config(architectures=["GPT2LMHeadModel"]),
        "whisper": WhisperConfig(architectures=["WhisperForConditionalGeneration"]),
        "clip": CLIPConfig(architectures=["CLIPModel"]),
        "llava": LlavaConfig(architectures=["LlavaForConditionalGeneration"]),
        "vit": ViTConfig(architectures=["ViTForImageClassification"]),
    }
    found = {name for name, config in configs.items() if reads_text(tokenizer, config)}
    assert found == {"gpt2", "llava"}
    assert not reads_text(tokenizer.parent, configs["gpt2"]), "no tokenizer"
