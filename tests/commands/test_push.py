"""A push, as a user runs it, against a stand-in of the hub; and what is not pushed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import constants

import spmconvert
from spmconvert.commands.push import own_files
from spmconvert.errors import CheckpointError, ModelNotFoundError, OutputError, VerificationError
from tests.commands.hub import OWNER, TOKEN, Hub


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


# the hub's client gives its HTTP library a file in a way that this deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SETTINGS = {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture
def pushed(hub, run, monkeypatch):
    """Exit code, output and last line of the command, with settings of the library that it reads once a process."""

    def call(*arguments, endpoint=hub.url, offline=False, token=TOKEN):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/none")
        monkeypatch.setenv("HF_TOKEN", token)
        code, out, error = run("push", *arguments)
        return code, out, error.strip().splitlines()[-1] if error.strip() else ""

    return call


@pytest.fixture
def copy(gpt2_spm, tmp_path):
    return shutil.copytree(gpt2_spm, tmp_path / "copy")


def test_the_command_in_a_process_of_its_own(hub, gpt2_spm):
    environment = {**os.environ, **SETTINGS, "HF_ENDPOINT": hub.url}
    command = [sys.executable, "-m", "spmconvert", "push", str(gpt2_spm), "small"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"{hub.url}/{OWNER}/small"), done.stderr
    assert hub.large


def test_a_checkpoint_is_there_as_it_is_here(hub, pushed, gpt2_spm, copy, tmp_path):
    code, out, error = pushed(gpt2_spm, "small", "--private", "--message", "first")
    assert (code, out.strip()) == (0, f"{hub.url}/{OWNER}/small"), error
    repository = hub.repositories[f"{OWNER}/small"]
    assert (repository.private, repository.messages) == (True, ["first"])
    files = {path.name: path.read_bytes() for path in gpt2_spm.iterdir()}
    assert repository.branches["main"] == {**files, ".gitattributes": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert spmconvert.load(tmp_path) is not None
    # another division of the weights, a report, and a file of the owner's
    there = repository.branches["main"]
    there |= dict.fromkeys(("model-00001-of-00002.safetensors", "model.safetensors.index.json", "report.json"), b"old")
    there |= dict.fromkeys(("picture.png", "onnx/model.safetensors"), b"mine")
    (copy / ".cache").mkdir()
    (copy / ".cache/kept").touch()
    code, out, error = pushed(copy, f"{OWNER}/small", "--private", "--json")
    assert code == 0, error
    result = json.loads(out)
    assert (result["repository"], result["files"]) == (f"{OWNER}/small", len(files))
    assert there == {**files, ".gitattributes": b"", "picture.png": b"mine", "onnx/model.safetensors": b"mine"}


def test_a_branch_is_made_and_main_stays(hub, pushed, gpt2_spm):
    for _ in range(2):
        code, out, error = pushed(gpt2_spm, "small", "--revision", "half/size")
        assert (code, out.strip()) == (0, f"{hub.url}/{OWNER}/small/tree/half/size"), error
    repository = hub.repositories[f"{OWNER}/small"]
    assert list(repository.branches["main"]) == [".gitattributes"]
    assert "model.safetensors" in repository.branches["half/size"]
    code, _, error = pushed(gpt2_spm, "small", "--private")
    assert code == 10
    assert "is there and public; make it private" in error


def test_no_network_no_token_and_no_rights_are_one_line(hub, pushed, gpt2_spm):
    code, out, error = pushed(gpt2_spm, "small", offline=True)
    assert (code, out) == (10, "")
    assert error == "error: HF_HUB_OFFLINE is set, so nothing is pushed; unset it"
    code, _, error = pushed(gpt2_spm, "small", token="")
    assert code == 12
    assert "there is no token of the hub on this machine; log in by" in error
    code, _, error = pushed(gpt2_spm, "small", token="hf_other")
    assert code == 12
    assert "does not let this token write to small (" in error
    code, _, error = pushed(gpt2_spm, "others/small")
    assert code == 12
    assert "under the namespace others" in error
    code, _, error = pushed(gpt2_spm, "small", endpoint="http://127.0.0.1:9")
    assert code == 10
    assert "small cannot be written on the hub (" in error
    code, _, error = pushed(gpt2_spm, "no/such/name")
    assert code == 2
    assert "'no/such/name' names no repository (" in error
    assert not hub.repositories


@pytest.mark.parametrize("name", ["training.log", "checkpoint-5/optimizer.pt", "notes.txt"])
def test_files_that_are_not_the_checkpoints_are_refused(copy, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).touch()
    with pytest.raises(OutputError, match=f"holds {name}, which the checkpoint does not have by itself"):
        own_files(copy)


def test_what_save_pretrained_wrote_is_told_from_what_a_trainer_leaves(gpt2_spm, tmp_path):
    model = spmconvert.load(gpt2_spm)
    model.save_pretrained(tmp_path)
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(own_files(tmp_path)) == names
    for name in ("optimizer.pt", "trainer_state.json", "runs/events.out.tfevents.1", "training_args.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        with pytest.raises(OutputError, match=f"holds {name}, which"):
            own_files(tmp_path)
        (tmp_path / name).unlink()


def test_damaged_unfinished_and_other_directories_are_refused(checkpoints, copy, tmp_path):
    with pytest.raises(CheckpointError, match="is not a converted checkpoint"):
        own_files(checkpoints["gpt2"])
    with pytest.raises(ModelNotFoundError):
        own_files(tmp_path / "none")
    partial = tmp_path / ".run.partial"
    partial.mkdir()
    (partial / "run.json").write_text("{}")
    with pytest.raises(OutputError, match="is not finished, no layer is fitted yet; finish it with --resume"):
        own_files(tmp_path / "run")
    card = copy / "README.md"
    card.write_text("edited")
    assert "README.md" in own_files(copy)
    with (copy / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(VerificationError, match=r"failed the check of hashes: tokenizer.json changed or gone"):
        own_files(copy)


def test_a_link_out_of_the_directory_is_refused(copy, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (copy / "README.md").unlink()
    (copy / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        own_files(copy)
