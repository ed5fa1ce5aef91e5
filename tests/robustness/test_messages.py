"""What is wrong with a command line: one line that names what was found, the limit and what to give, and an exit code.

No sentence of pydantic, typer or transformers gets through as it is.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from spmconvert.checkpoint.reader import Checkpoint
from spmconvert.errors import CheckpointError, ModelNotFoundError, NotWritableError, OptionError, RecipeError
from spmconvert.system.validation import KNOWN
from tests.support import QUICK, assert_refused


def name_of(value):
    return " ".join(value)[:40] if isinstance(value, tuple) else ""


# how those libraries begin what they say
FOREIGN = (
    "should be",
    "Input ",
    "Usage:",
    "Invalid value",
    "unable to",
    "╭",
    "valid dictionary",
    "pydantic",
    "No such option",
)
CONVERT = [
    (("--keep", "2"), RecipeError, "--keep 2.0 is not a share; give one between 0 and 1, such as 0.25"),
    (("--keep", "nan"), RecipeError, "--keep nan is not finite"),
    (("--keep", "25%"), OptionError, "--keep 25% is no number; write 0.25"),
    (("--keep", "x"), OptionError, "--keep x is no number; give one, such as 0.25"),
    (("--keep-flops", "1"), RecipeError, "--keep-flops 1.0 is not a share"),
    (("--keep-bytes", "lots"), RecipeError, "--keep-bytes lots is no size; write one such as 40MB"),
    (("--speedup", "0.5"), RecipeError, "--speedup 0.5 is not above 1; give a number above 1"),
    (("--speedup", "inf"), RecipeError, "--speedup inf is not finite"),
    (("--set", "targets=5"), RecipeError, 'targets is a list of patterns, found 5; write it in brackets, such as ["mlp"]'),
    (("--set", "fit=5"), RecipeError, "fit is a table, found 5; set a key of it: fit.iterations=VALUE"),
    (("--set", "design.terms=[5]"), RecipeError, "design.terms.0 is a table, found 5"),
    (("--set", "overrides=[{rank=5}]"), RecipeError, "overrides.0.pattern is missing"),
    (("--set", "overrides=[{pattern=5}]"), RecipeError, "overrides.0.pattern 5 is no text"),
    (("--set", "fit.iterations=1.5"), RecipeError, "fit.iterations 1.5 is no whole number"),
    (("--set", "allow_growth=7"), RecipeError, "allow_growth 7 is neither true nor false"),
    (("--set", "calibration.file=5"), RecipeError, "--calib 5 is no path"),
    (("--set", "budget.structures=[]"), RecipeError, "--structures [] is empty; give at least 1"),
    (("--structures", "foo", "--keep", "0.5"), RecipeError, "foo is no kind of term; choose among spm"),
    (("--variant", "skew"), RecipeError, "--variant skew is unknown; choose among general, rotation"),
    (("--stages", "x"), OptionError, "--stages x is no whole number; give one, such as 4"),
    (("--seed", str(10**22)), RecipeError, f"is not below {2**63}"),
    (("--num-processes", "0"), OptionError, "--num-processes 0 is below 1; give a number from 1 on"),
    (("--targts", "mlp"), OptionError, "there is no option --targts; did you mean --targets"),
    (("--measure", "--calib"), OptionError, "--calib needs a value; write --calib VALUE"),
    (("--calib", ""), OptionError, "--calib is empty; name a file, or none"),
    (("--calib=",), OptionError, "--calib is empty; name a file, or none"),
    (("--recipe", ""), OptionError, "--recipe is empty"),
    (("--set", "calibration.file="), RecipeError, "is empty; name a file, or none"),
    (("--force=1",), OptionError, "--force takes no value; write it alone"),
    (("extra",), OptionError, "extra is not understood; spmconvert convert --help"),
]
OTHERS = [
    (("bogus",), OptionError, "bogus is not understood; spmconvert --help"),
    (("convert",), OptionError, "MODEL is missing; spmconvert convert --help"),
    (("convert", "https://huggingface.co/gpt2"), ModelNotFoundError, "give the hub id: gpt2"),
    (("convert", "https://huggingface.co/a/b/tree/main"), ModelNotFoundError, "give the hub id: a/b"),
    (("convert", "https://huggingface.co/gpt2/tree/main"), ModelNotFoundError, "give the hub id: gpt2"),
    (("convert", "https://example.com/m"), ModelNotFoundError, "is an address"),
    (("finetune", "m", "--set", "finetune.steps=1"), RecipeError, "leave the prefix out: --set steps=VALUE"),
    (("finetune", "m", "--steps", "0"), RecipeError, "--steps 0 is below 1"),
    (("finetune", "m", "--minutes", "0"), RecipeError, "--minutes 0.0 is not above 0"),
    (("finetune", "m", "--minutes", "inf"), RecipeError, "--minutes inf is not finite"),
    (("finetune", "m", "--lr", "inf"), RecipeError, "--lr inf is not finite"),
    (("finetune", "m", "--set", "temperature=nan"), RecipeError, "finetune.temperature nan is not finite"),
    (("finetune", "m", "--data", ""), OptionError, "--data is empty"),
    (("report", "m", "--rows", "x"), OptionError, "--rows x is no whole number"),
    (("report", "m", "-o", __file__), NotWritableError, "is no directory"),
    (("demo", "-o", ""), OptionError, "-o is empty"),
    (("demo", "--steps", "0", "-o", "never"), RecipeError, "--steps 0 is below 1"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), OTHERS, ids=name_of)
def test_commands(run, tmp_path, monkeypatch, arguments, error, words):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert_refused(result, error, words)
    assert not any(piece in result[2] for piece in FOREIGN), result[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "error", "words"), CONVERT, ids=name_of)
def test_options_of_a_conversion(run, tmp_path, monkeypatch, options, error, words):
    test_commands(run, tmp_path, monkeypatch, ("convert", "m", *options), error, words)


def test_a_recipe_file_is_named_where_it_is_at_fault(run, tmp_path):
    (tmp_path / "r.toml").write_text("[budget]\nkeep = 3\n")
    assert_refused(
        run("convert", "m", "--recipe", tmp_path / "r.toml"), RecipeError, f"recipe {tmp_path}/r.toml: budget.keep 3"
    )
    assert_refused(run("convert", "m", "--recipe", tmp_path / "r.toml", "--keep", "2"), RecipeError, "error: --keep 2.0")


def test_every_phrase_has_a_remedy():
    assert all(what.startswith(("is ", "has ")) and remedy for what, remedy in KNOWN.values())


def test_no_command_shows_the_help(run):
    code, out, _ = run()
    assert code == 2
    assert all(name in out for name in ("convert", "finetune", "report", "verify", "export", "demo"))


def test_a_source_that_goes_away(run, checkpoints, tmp_path, monkeypatch):
    shutil.copytree(checkpoints["llama"], tmp_path / "m")
    command = ("convert", tmp_path / "m", "-o", tmp_path / "o", "--calib", "none", "--stages", "2")
    read = Checkpoint.read

    def gone(self, name):
        (tmp_path / "m" / "model.safetensors").unlink(missing_ok=True)
        return read(self, name)

    with monkeypatch.context() as changed:
        changed.setattr(Checkpoint, "read", gone)
        assert_refused(run(*command), CheckpointError, "(gone); restore it", "--resume")
    shutil.copy(checkpoints["llama"] / "model.safetensors", tmp_path / "m")
    assert run(*command, "--resume")[0] == 0


def test_two_rows_are_warned_of(run, checkpoints, text, tmp_path):
    options = [f"--set={key}={value}" for key, value in QUICK.items()]
    command = ("convert", checkpoints["llama"], "--calib", text, "--stages", "2", *options)
    few = ("--set", "calibration.rows=2", "--set", "calibration.tokens=8")
    assert "fewer than the 88 inputs of a layer" in run(*command, "-o", tmp_path / "few", *few)[2]
    assert "warning" not in run(*command, "-o", tmp_path / "enough")[2]


# a process is interrupted when it first imports the module
INTERRUPTED = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from spmconvert.__main__ import run
sys.argv = ["spmconvert", "convert", "nosuch"]
run()
"""


@pytest.mark.parametrize(
    "module", ["spmconvert.cli.app", "pydantic", "rich.text", "typer", "torch", "numpy", "spmconvert.fit.run"]
)
def test_an_interrupt_while_modules_are_imported(module):
    code = INTERRUPTED.format(module=module)
    # a suite that runs in the background ignores interrupts, and so would its children
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    ended = subprocess.run([sys.executable, "-c", heard + code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "interrupted before anything was kept; start again\n")


def test_an_interrupt_stays_ignored_where_it_was():
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + INTERRUPTED.format(module="pydantic")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == ModelNotFoundError.exit_code


def test_an_interrupted_worker_gives_the_code_of_an_interrupt(tmp_path, monkeypatch):
    from spmconvert.cli.processes import run_in_processes

    file = tmp_path / "python"
    # one that this process may ignore cannot be heard by a shell of it
    heard = "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    file.write_text(f"#!{sys.executable}\n{heard}os.kill(os.getpid(), signal.SIGINT)\n")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", os.fspath(file))
    assert run_in_processes(["finetune"], 1) == 128 + signal.SIGINT
