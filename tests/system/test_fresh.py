"""Fresh processes: what they return, and that nothing in the working directory is imported or asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import spmconvert
from spmconvert.errors import SpmconvertError
from spmconvert.system.fresh import run_fresh

MODULE_THAT_LEAVES_A_MARK = """
from pathlib import Path
Path(__file__).with_name("mark").write_text(__name__)
"""


def plant(directory, *names):
    for name in names:
        (directory / f"{name}.py").write_text(MODULE_THAT_LEAVES_A_MARK)


@pytest.fixture
def planted(gpt2_spm, tmp_path):
    """A converted checkpoint with modules of its own that Python and the libraries would import by name."""
    directory = tmp_path / "planted"
    shutil.copytree(gpt2_spm, directory)
    plant(directory, "contextlib", "typing_extensions", "random", "spmconvert_planted")
    return directory


def command(arguments, directory, *options, **environment):
    return subprocess.run(
        [sys.executable, *options, "-m", "spmconvert", *map(str, arguments)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(Path(spmconvert.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_answer():
    assert run_fresh("os.path:join", "a", "b") == "a/b"


def test_no_answer():
    with pytest.raises(SpmconvertError, match=r"could not run math:sqrt: .*math domain error"):
        run_fresh("math:sqrt", -1)


@pytest.mark.usefixtures("typed_ahead")
def test_nothing_is_read_from_the_terminal():
    with pytest.raises(SpmconvertError, match="EOF"):
        run_fresh("builtins:input")


@pytest.mark.parametrize("path", ["", ":", None])
def test_modules_beside_a_checkpoint_are_not_imported_in_a_fresh_process(planted, monkeypatch, path):
    monkeypatch.chdir(planted)
    monkeypatch.delenv("PYTHONPATH", raising=False) if path is None else monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(SpmconvertError, match="No module named 'spmconvert_planted'"):
        run_fresh("spmconvert_planted:anything")
    # and none in the processes that it starts
    program = "import random; print(random.__file__)"
    assert run_fresh("subprocess:call", [sys.executable, "-c", program]) == 0
    assert not (planted / "mark").exists()


@pytest.mark.parametrize("name", ["verify", "finetune"])
def test_modules_beside_a_checkpoint_are_not_imported_by_a_command(planted, text, tmp_path, name):
    arguments = {
        "verify": ["."],
        "finetune": [".", "--data", text, "-o", tmp_path / "o", "--steps", 1, "--batch-size", 4, "--num-processes", 2],
    }
    # as the installed command starts
    ended = command([name, *arguments[name]], planted, "-P")
    assert not (planted / "mark").exists(), (planted / "mark").read_text()
    reached = {"verify": "loads as GPT2LMHeadModel", "finetune": "after 1 steps"}
    assert reached[name] in ended.stdout, ended


def test_modules_of_the_working_directory_are_not_imported_after_dash_m(tmp_path):
    plant(tmp_path, "typing_extensions", "random")
    assert command(["--help"], tmp_path).returncode == 0
    assert not (tmp_path / "mark").exists(), (tmp_path / "mark").read_text()


def test_the_package_of_the_working_directory_is_the_one_that_runs(tmp_path):
    shutil.copytree(Path(spmconvert.__file__).parent, tmp_path / "spmconvert", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "spmconvert" / "version.py").write_text('"""A version of its own."""\n__version__ = "7.7.7"\n')
    ended = command(["--version"], tmp_path, PYTHONPATH="")
    assert "7.7.7" in ended.stdout, ended.stderr


def test_a_process_that_the_system_ends_says_so():
    with pytest.raises(SpmconvertError, match=r"could not run os:abort: it was ended by SIGABRT$"):
        run_fresh("os:abort")
    with pytest.raises(SpmconvertError, match=r"it was ended by SIGKILL, as the system does where memory runs out"):
        run_fresh("signal:raise_signal", 9)
