"""The command as a user meets it: what it prints, where, and one exit code for every kind of bad input."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from spmconvert import errors
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.cli import progress
from spmconvert.commands.verify import loaded
from tests.support import assert_refused

QUICK = ("--stages", "7", "--set", "fit.iterations=4", "--set", "calibration.rows=16")


def test_convert_prints_a_table_and_writes(run, checkpoints, text, tmp_path):
    code, out, _ = run("convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--targets", "mlp", "--calib", text, *QUICK)
    assert code == 0
    for name in ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj"):
        assert re.search(rf"{re.escape(name)} +\d+ x \d+ +\d+ stages, general +[\d.]+% +0\.\d+ +0\.\d+ +[\d.]+ s", out), out
    assert "SVD same size" in out
    assert "held out, on 2 rows" in out
    assert "next:" in out
    assert (tmp_path / "o" / "model.safetensors").exists()


def test_default_output_and_frobenius_note(run, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("convert", checkpoints["gpt2"], "--calib", "none", "--set", "fit.iterations=1")
    assert code == 0
    assert (tmp_path / "gpt2-spm" / "config.json").exists()
    assert "Frobenius" in err
    assert "no data was used" in out


def test_json(run, checkpoints, text, tmp_path):
    code, out, _ = run("convert", checkpoints["bert"], "-o", tmp_path / "o", "--calib", text, "--json", *QUICK)
    assert code == 0
    result = json.loads(out)
    assert result["output"] == str(tmp_path / "o")
    assert result["layers"][0]["name"] == "encoder.layer.0.intermediate.dense"
    assert result["parameters_after"] < result["parameters_before"]


def test_dry_run_touches_nothing(run, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("convert", checkpoints["llama-tied"], "--targets", "all", "--stages", 2, "--dry-run")
    assert code == 0
    assert "model.layers.0.self_attn.q_proj" in out
    assert "left alone: lm_head (shares its weight with model.embed_tokens)" in out
    assert "llama-tied-spm" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_predicts_what_happens(run, checkpoints, text, tmp_path):
    options = ("convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--calib", text, "--json", *QUICK)
    planned = json.loads(run(*options, "--dry-run")[1])
    done = json.loads(run(*options)[1])
    assert planned["output_bytes"] == done["bytes_after"]
    assert [layer["parameters_after"] for layer in planned["layers"]] == [layer["parameters"] for layer in done["layers"]]
    assert planned["predicted_seconds"] > 0


def test_dry_run_names_the_terms_of_every_layer(run, checkpoints):
    terms = '[{kind = "lowrank", rank = 3}, {kind = "sparse24"}]'
    command = ("convert", checkpoints["llama"], "--targets", "*.up_proj", "--set", f"design.terms={terms}", "--dry-run")
    code, out, _ = run(*command, "--json")
    assert code == 0
    for layer in json.loads(out)["layers"]:
        assert layer["terms"] == [
            {"kind": "sparse24", "wrap": False, "wrap_block": 0, "wrap_stages": 0},
            {"kind": "lowrank", "rank": 3},
        ]
        # numbers in four bytes, positions in half a one each four inputs, the mark
        assert layer["bytes_after"] == 4 * layer["parameters_after"] + 88 * 4 + 4
    code, out, _ = run(*command)
    assert code == 0
    assert "2:4 + rank 3" in out


def test_a_budget_is_shown_by_kinds_of_terms(run, checkpoints, text, tmp_path):
    command = ("convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--calib", text, "--keep", 0.5, "--allow-slower")
    command += ("--structures", "sparse24,lowrank", "--set", "budget.iterations=2", *QUICK[2:])
    assert run(*command)[0] == 0
    code, out, _ = run(*command, "--dry-run", "--json")
    assert code == 0
    planned = json.loads(out)
    # the smallest share is below rank one
    assert [row["keep"] for row in planned["budgets"]] == [0.1, 0.25, 0.5, 0.75]
    for row in planned["budgets"]:
        assert sum(row["layers"].values()) == 4
        assert row["layers"].keys() <= {"sparse24", "lowrank", "sparse24+lowrank", "dense"}
        assert 0 < row["kept"] <= row["keep"]
    code, out, _ = run(*command, "--dry-run")
    assert code == 0
    assert re.search(r"--keep +predicted loss +layers +checkpoint", out)
    assert re.search(r"50% +\S+ +\d (lowrank|dense|sparse24)", out)


def test_options_reach_the_recipe(run, checkpoints, tmp_path):
    code, out, _ = run(
        *(
            "convert",
            checkpoints["gpt2"],
            "--targets",
            "c_fc,re:.*c_attn",
            "--ignore",
            "*.0.*",
            "--layers",
            "1",
            "--stages",
            3,
        ),
        *("--variant", "rotation", "--seed", 7, "--dtype", "bfloat16", "--set", "fit.iterations=9", "--dry-run", "--json"),
    )
    assert code == 0
    planned = json.loads(out)
    assert [layer["layer"] for layer in planned["layers"]] == ["transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_fc"]
    assert {(term["stages"], term["variant"]) for layer in planned["layers"] for term in layer["terms"]} == {
        (3, "rotation")
    }
    assert (planned["recipe"]["seed"], planned["recipe"]["dtype"], planned["recipe"]["fit"]["iterations"]) == (
        7,
        "bfloat16",
        9,
    )


def test_help_and_version(run):
    assert run("--version")[1].startswith("spmconvert 0.")
    code, out, _ = run("convert", "--help")
    assert code == 0
    for option in ("--targets", "--calib", "--resume", "--dry-run"):
        assert option in out


def test_unknown_option_is_a_usage_error(run, checkpoints):
    code, _, err = run("convert", checkpoints["gpt2"], "--stagez", "3")
    assert code == 2
    assert "--stagez" in err


def test_exit_codes_are_distinct():
    codes = [
        value.exit_code
        for value in vars(errors).values()
        # a finer kind has the code of the one that it is of
        if isinstance(value, type) and issubclass(value, errors.SpmconvertError) and "exit_code" in vars(value)
    ]
    assert len(codes) == len(set(codes)) == 16
    for code in codes:
        assert f" {code} " in errors.__doc__


def test_no_such_model(run, tmp_path):
    assert_refused(run("convert", tmp_path / "none"), errors.ModelNotFoundError, "no directory", "check the path")


def test_no_such_hub_model(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(run("convert", "owner/none"), errors.ModelNotFoundError, "owner/none", "HF_HUB_OFFLINE")


def test_not_a_checkpoint(run, tmp_path):
    assert_refused(run("convert", tmp_path), errors.CheckpointError, "no config.json")


def test_unknown_architecture(run, checkpoints, tmp_path):
    shutil.copytree(checkpoints["gpt2"], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for change, word in (
        ({"model_type": "nonsense"}, "not understood"),
        ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
    ):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
        assert_refused(run("convert", tmp_path / "m"), errors.CheckpointError, word)


def test_nothing_matched(run, checkpoints):
    assert_refused(run("convert", checkpoints["llama"], "--targets", "up_porj"), errors.TargetError, "up_porj", "up_proj")


def test_unsupported_layer(run, checkpoints):
    result = run("convert", checkpoints["llama"], "--targets", "model.embed_tokens")
    assert_refused(result, errors.UnsupportedLayerError, "Embedding", "nn.Linear")


def test_tied_head(run, checkpoints):
    assert_refused(run("convert", checkpoints["llama-tied"], "--targets", "lm_head"), errors.TargetError, "embed_tokens")


@pytest.mark.parametrize(
    "options",
    [
        ("--resume", "--dry-run"),
        ("--layers", "9"),
        ("--layers", "x"),
        ("--targets", ""),
        ("--rank", "99"),
        ("--targets", "re:("),
    ],
)
def test_conflicting_or_malformed_options(run, checkpoints, options):
    assert_refused(run("convert", checkpoints["gpt2"], *options), errors.OptionError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--variant", "skew"), ("--variant skew", "general, rotation")),
        (("--stages", "-1"), ("--stages -1",)),
        (("--variant", "rotation", "--block", "2"), ("rotation needs block 1",)),
        (("--set", "fit.iteration=3"), ("unknown key 'fit.iteration'", "iterations")),
        (("--set", "nonsense"), ("key=value",)),
        (("--recipe", "none.toml"), ("none.toml", "does not exist")),
    ],
)
def test_bad_recipe(run, checkpoints, options, words):
    assert_refused(run("convert", checkpoints["gpt2"], *options), errors.RecipeError, *words)


def test_unknown_recipe_key(run, checkpoints, tmp_path):
    (tmp_path / "r.toml").write_text("stagez = 3\n")
    result = run("convert", checkpoints["gpt2"], "--recipe", tmp_path / "r.toml")
    assert_refused(result, errors.RecipeError, "r.toml", "unknown key 'stagez'", "known keys are targets")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.txt", b"", ("is empty",)),
        ("t.txt", b"   \n\n", ("is empty",)),
        ("t.txt", b"too short", ("has 9 tokens, one row has 64",)),
        ("t.txt", b"\xff\xfe\x00x", ("not UTF-8",)),
        ("t.csv", b"a,b", (".csv", ".jsonl")),
        ("t.jsonl", b"{", ("line 1", "not JSON")),
        ("t.jsonl", b'{"body": "x"}', ("no text under 'text'",)),
        (None, b"", ("cannot be read",)),
    ],
)
def test_bad_calibration_text(run, checkpoints, tmp_path, name, content, words):
    file = tmp_path / (name or "none.txt")
    if name:
        file.write_bytes(content)
    # a causal model joins documents, so the end-of-text token counts too
    words = tuple(word.replace("9 tokens", "10 tokens") for word in words)
    result = run("convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--calib", file, *QUICK)
    assert_refused(result, errors.CalibrationError, *words)
    assert not (tmp_path / "o").exists()


def test_single_document_for_an_encoder(run, checkpoints, tmp_path):
    (tmp_path / "t.txt").write_text("one line of text that is long enough to count as a document of its own here")
    result = run("convert", checkpoints["bert"], "-o", tmp_path / "o", "--calib", tmp_path / "t.txt")
    assert_refused(result, errors.CalibrationError, "1 row", "held out")


def test_corrupt_shard(run, checkpoints, tmp_path):
    shutil.copytree(checkpoints["llama-sharded"], tmp_path / "m")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    assert_refused(run("convert", tmp_path / "m"), errors.CorruptCheckpointError, shard.name, "download")


def test_output_exists(run, checkpoints, tmp_path):
    (tmp_path / "o").mkdir()
    result = run("convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--set", "fit.iterations=1")
    assert_refused(result, errors.OutputError, "--force")


def test_nothing_to_resume(run, checkpoints, tmp_path):
    assert_refused(
        run("convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--resume"), errors.OutputError, "without --resume"
    )


def test_no_space(run, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (1, 1, 0) and type("usage", (), {"free": 1000})())
    assert_refused(run("convert", checkpoints["gpt2"], "-o", tmp_path / "o"), errors.SpaceError, "1.0 kB free")


def test_no_write_permission(run, checkpoints, tmp_path):
    (tmp_path / "file").write_text("x")
    result = run("convert", checkpoints["gpt2"], "-o", tmp_path / "file" / "o")
    assert_refused(result, errors.NotWritableError, "cannot be written", "-o")


def test_output_in_use(run, checkpoints, tmp_path):
    with OutputDirectory(tmp_path / "o", fingerprint="f", force=False, resume=False, needed_bytes=1):
        assert_refused(run("convert", checkpoints["gpt2"], "-o", tmp_path / "o"), errors.LockedError, "another run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(run, checkpoints, tmp_path):
    result = run("convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--device", "cuda")
    assert_refused(result, errors.BackendError, "cuda", "--device cpu")


def test_ctrl_c_says_how_to_resume(run, checkpoints, text, tmp_path):
    command = ["convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--calib", text]
    settings = ["--stages", "7", "--set", "calibration.rows=16", "--set", "fit.iterations=400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "spmconvert", *map(str, command), *settings],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # a shell's background job ignores the signal, and hands that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".o.partial/layers/*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == errors.INTERRUPTED_EXIT_CODE
    assert "--resume" in err
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()
    assert run(*command, *settings, "--resume")[0] == 0
    assert (tmp_path / "o" / "config.json").exists()


def test_a_log_without_a_terminal_says_how_far_the_work_is(run, checkpoints, text, tmp_path, monkeypatch):
    command = ["convert", checkpoints["gpt2"], "-o", tmp_path / "out", "--calib", text, "--rank", 2]
    command += ["--set", "calibration.rows=8", "--set", "fit.iterations=2"]
    _, _, err = run(*command)
    assert " of 4" not in err, "a short run needs no lines about its progress"
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    _, _, err = run(*command, "--force")
    # two batches, of rows that are fitted and of the one that measures, in two blocks
    assert "calibrating: 4 of 4" in err
    assert len(re.findall(r"fitted \S+ \(error [\d.]+, [\d.]+ s\): \d of 4", err)) == 4, err
    assert "\n\n" not in err


EVIL = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, PreTrainedTokenizerFast

class Config(LlamaConfig):
    model_type = "evil"

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("what", ["config", "tokenizer"])
@pytest.mark.parametrize("command", ["convert", "verify"])
def test_code_of_a_checkpoint_never_runs_and_nobody_is_asked(
    run, checkpoints, converted, text, tmp_path, monkeypatch, what, command
):
    directory = tmp_path / "m"
    shutil.copytree(checkpoints["gpt2"] if command == "convert" else converted["gpt2"], directory)
    (directory / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "mark")))
    file = directory / ("config.json" if what == "config" else "tokenizer_config.json")
    change = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    if what == "tokenizer":
        change = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
    if command == "convert":
        result = run("convert", directory, "-o", tmp_path / "o", "--calib", text, *QUICK)
        if what == "config":
            assert_refused(result, errors.CheckpointError, "needs code of its own, which is never run")
        else:
            assert result[0] == 0, "its files make a tokenizer without that code"
    elif what == "config":
        with pytest.raises(errors.CheckpointError, match="never run"):
            loaded(str(directory), None)
    else:
        # the tokenizer is not needed, and so it is not looked at
        assert loaded(str(directory), [3, 4])["layers"] == 4
    assert not (tmp_path / "mark").exists()
