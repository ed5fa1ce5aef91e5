"""Places that cannot be written, devices and numbers that are none, and what an interrupted run says: one line each."""

import errno
import json
import os
import shutil

import pytest

from spmconvert.commands import convert as converting
from spmconvert.errors import (
    BackendError,
    CalibrationError,
    CheckpointError,
    LockedError,
    NotWritableError,
    OptionError,
    OutputError,
    RecipeError,
    SpaceError,
)
from spmconvert.system import caches
from tests.support import QUICK, assert_refused

STAGES = ("--calib", "none", "--stages", "2")
SHORT = ("--steps", "2", "--block-size", "16", "--batch-size", "2", "--set", "evaluation_rows=2")


def full(monkeypatch, *, words=False):
    """No file can be written any more; numpy says so in words alone."""

    def refuse(*_, **__):
        raise OSError("23664 requested and 2016 written") if words else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caches, "save_whole", refuse)


def test_a_name_that_is_too_long(run, checkpoints, tmp_path):
    assert_refused(
        run("convert", checkpoints["llama"], "-o", tmp_path / ("n" * 250), *STAGES), NotWritableError, "too long"
    )


def test_a_link_to_itself(run, checkpoints, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert_refused(run("convert", checkpoints["llama"], "-o", tmp_path / "loop", *STAGES), OutputError, "loop")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc")  # noqa: PTH112
def test_a_place_where_no_file_can_be_made_is_not_locked(run, checkpoints):
    code, _, err = run("convert", checkpoints["llama"], "-o", "/proc/x", *STAGES)
    assert code == NotWritableError.exit_code != LockedError.exit_code, err


def test_a_full_disk_under_the_cache_of_curves(run, checkpoints, text, tmp_path, monkeypatch):
    full(monkeypatch)
    options = [f"--set={key}={value}" for key, value in QUICK.items()]
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    command = ("convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--calib", text, "--keep", "0.5", "--allow-slower")
    result = run(*command, "--structures", "lowrank", *options)
    assert_refused(result, SpaceError, "SPMCONVERT_CACHE")


def test_a_full_disk_under_the_cache_of_tokens(run, converted, text, tmp_path, monkeypatch):
    model = converted["llama"]
    full(monkeypatch, words=True)
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    result = run("finetune", model, "--data", text, "-o", tmp_path / "t", *SHORT)
    assert_refused(result, SpaceError, "SPMCONVERT_CACHE")


def test_an_export_does_not_advise_to_resume(run, converted, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = converted["llama"]
    monkeypatch.setattr("spmconvert.checkpoint.writer._save_shard", refuse)
    code, _, err = run("export", model, "-o", tmp_path / "dense")
    assert code == SpaceError.exit_code
    assert "--resume" not in err
    assert "run the command again" in err


def test_what_is_missing_is_said_in_units_that_show_it(run, checkpoints, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
    result = run("convert", checkpoints["llama"], "-o", tmp_path / "o", *STAGES)
    assert_refused(result, SpaceError, "4.1 kB free", "kB;")


@pytest.mark.parametrize(
    ("name", "content"), [(b"a\nb", b"x"), (b"\xff\xfe", b""), (b"a\x1b[31m", b"")], ids=["newline", "no text", "escape"]
)
def test_a_file_whose_name_is_no_text(run, checkpoints, tmp_path, name, content):
    shutil.copytree(checkpoints["llama"], tmp_path / "m")
    with open(os.fsencode(tmp_path / "m") + b"/" + name, "wb") as file:  # noqa: PTH123 - a path may not be bytes
        file.write(content)
    result = run("convert", tmp_path / "m", "-o", tmp_path / "o", *STAGES)
    assert_refused(result, CheckpointError, "rename it or remove it")
    assert "\x1b" not in result[2]


def test_a_card_that_is_a_pipe_is_not_waited_for(run, checkpoints, tmp_path):
    shutil.copytree(checkpoints["llama"], tmp_path / "m")
    os.mkfifo(tmp_path / "m" / "README.md")
    assert run("convert", tmp_path / "m", "-o", tmp_path / "o", *STAGES)[0] == 0


def test_a_tokenizer_of_another_model(run, checkpoints, text, tmp_path):
    shutil.copytree(checkpoints["llama"], tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["a"] = 5000
    file.write_text(json.dumps(tokenizer))
    result = run("convert", tmp_path / "m", "-o", tmp_path / "o", "--calib", text, "--stages", "2")
    assert_refused(result, CalibrationError, "5000", "96")


@pytest.mark.parametrize(
    ("command", "error", "words"),
    [
        (("convert", "m", "--device", "meta"), BackendError, ("meta", "--device cpu")),
        (("convert", "m", "--layers", "1-0"), OptionError, ("runs backwards", "0-1")),
        (("convert", "m", "--layers", "-1--2"), OptionError, ("runs backwards", "-2--1")),
        (("convert", "m", "--seed", "99999999999999999999"), RecipeError, ("seed",)),
        (("finetune", "o", "--data", "t", "--teacher-device", "nowhere"), BackendError, ("nowhere",)),
        (("finetune", "o", "--data", "t", "--seed", "99999999999999999999"), RecipeError, ("seed",)),
        (("report", "o", "--seconds", "nan"), OptionError, ("seconds is nan", "from 0 on")),
        (("report", "o", "--seconds", "inf"), OptionError, ("seconds is inf",)),
        (("report", "o", "--baselines", "--calib", "nosuch.txt"), CalibrationError, ("nosuch.txt",)),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, tuple) else None,
)
def test_values_that_make_no_sense(run, checkpoints, converted, text, tmp_path, command, error, words):
    places = {"m": checkpoints["llama"], "o": converted["llama"], "t": text}
    given = [places.get(part, part) for part in command]
    where = ("-o", tmp_path / "x") if command[0] != "report" else ()
    assert_refused(run(*given, *where), error, *words)


def test_another_teacher_is_no_fault_of_the_checkpoint(run, checkpoints, converted):
    result = run("verify", converted["llama"], "--teacher", checkpoints["llama-sharded"])
    assert_refused(result, CheckpointError, "is not the checkpoint", "--teacher")
    assert "convert again" not in result[2]


def test_an_interrupted_run_says_what_it_has_left(run, checkpoints, text, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    command = ("convert", checkpoints["llama"], "-o", tmp_path / "o", "--calib", text, "--stages", "2")
    with monkeypatch.context() as early:
        early.setattr(converting, "calibration_rows", interrupted)
        code, _, err = run(*command)
    assert (code, "start again" in err, "--resume" in err) == (130, True, False)
    with monkeypatch.context() as late:
        late.setattr(converting, "fit_all", interrupted)
        code, _, err = run(*command)
    assert (code, "--resume" in err) == (130, True)
    assert run(*command, "--resume")[0] == 0
