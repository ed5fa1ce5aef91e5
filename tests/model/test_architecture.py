"""Code that comes with a checkpoint never runs: nobody is asked, and the error says so in one line."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
from transformers import PretrainedConfig

from spmconvert.data.tokens import load_tokenizer, row_length
from spmconvert.errors import CalibrationError, CheckpointError
from spmconvert.model.architecture import load_config, model_class
from tests.conftest import gpt2_config
from tests.support import CODE_OF_ITS_OWN, assert_refused


@pytest.fixture
def checkpoint(checkpoints, tmp_path, monkeypatch):
    """A checkpoint with code of its own, and a user who would say yes to it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "own"
    shutil.copytree(checkpoints["gpt2"], directory)
    (directory / "own.py").write_text(CODE_OF_ITS_OWN.format(mark=str(tmp_path / "mark")))
    yield directory
    assert not (tmp_path / "mark").exists(), "the code ran"


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_config(checkpoint):
    change(checkpoint / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(CheckpointError, match="needs code of its own, which is never run") as caught:
        load_config(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_config_on_the_command_line(checkpoint, run):
    change(checkpoint / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    assert_refused(
        run("convert", checkpoint, "--calib", "none"), CheckpointError, "needs code of its own, which is never run"
    )


def test_a_tokenizer(checkpoint):
    own = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    change(checkpoint / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
    # of GPT-2 transformers has a tokenizer itself, and takes that
    change(checkpoint / "config.json", model_type="vit")
    with pytest.raises(CalibrationError, match="needs code of its own, which is never run") as caught:
        load_tokenizer(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_looked_at_for_its_positions(checkpoint):
    class OwnConfig(PretrainedConfig):
        model_type = "own-positions"

    config = OwnConfig(max_position_embeddings=8, pad_token_id=0, auto_map={"AutoModel": "own.OwnModel"})
    config.name_or_path = str(checkpoint)
    with pytest.raises(CheckpointError, match="needs code of its own, which is never run"):
        row_length(config, 32)


def test_code_that_is_not_needed_is_left_alone(checkpoint):
    own = {name: f"own.Own{name}" for name in ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoModelForCausalLM")}
    change(checkpoint / "config.json", auto_map=own)
    assert model_class(load_config(checkpoint)).__name__ == "GPT2LMHeadModel"
    load_tokenizer(checkpoint)
    assert row_length(load_config(checkpoint), 128) == 64


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "pipeline", "__version__", "GPT2Config", "OwnModel"])
def test_only_model_classes_are_architectures(name):
    with pytest.raises(CheckpointError, match=f"has no architecture {name}; upgrade"):
        model_class(gpt2_config(architectures=[name]))
    with pytest.raises(CheckpointError, match=f"has no architecture {name}; it needs code of its own"):
        model_class(gpt2_config(architectures=[name], auto_map={"AutoModel": "own.OwnModel"}))


def test_a_config_without_an_architecture():
    with pytest.raises(CheckpointError, match="names no architecture"):
        model_class(gpt2_config())


@pytest.mark.parametrize("names", [[7], "GPT2LMHeadModel", {"a": "b"}])
def test_architectures_are_a_list_of_names(names):
    with pytest.raises(CheckpointError, match="it needs a list such as"):
        model_class(SimpleNamespace(architectures=names))
