"""Several processes of one command: how they are started, and which exit code is the answer."""

import sys

import pytest

from spmconvert.cli.processes import run_in_processes


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """Makes a shell script take the interpreter's place."""

    def replace(script):
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))

    return replace


@pytest.mark.usefixtures("typed_ahead")
def test_they_read_no_input(interpreter):
    interpreter("read line && exit 3; exit 0")
    assert run_in_processes(["finetune"], 1) == 0


def test_they_import_nothing_from_the_working_directory(interpreter):
    interpreter('test "$PYTHONSAFEPATH" = 1 && test "$*" = "-m spmconvert finetune x"')
    assert run_in_processes(["finetune", "x"], 2) == 0


def test_the_first_that_fails_gives_the_exit_code(interpreter, capsys):
    interpreter('test "$RANK" = 0 && exec sleep 60; echo "error: of $RANK" >&2; exit 9')
    assert run_in_processes(["finetune"], 2) == 9
    assert capsys.readouterr().err == "error: of 1\n"
