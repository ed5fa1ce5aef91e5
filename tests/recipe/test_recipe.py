"""Recipes: every shipped one loads, unknown keys and bad values are errors, single values can be replaced."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from spmconvert.errors import RecipeError
from spmconvert.recipe.loading import load_recipe, parse_assignment, recipe_from_keywords

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))


def test_recipes_are_shipped():
    assert {file.stem for file in RECIPES} == {"gpt2", "llama-1b", "minilm", "moe", "smollm2-135m"}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipe_loads_and_says_what_it_gives(file):
    recipe = load_recipe(file, {})
    assert recipe.budget.limits
    assert recipe.finetune.minutes
    head = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    for command in ("convert", "finetune"):
        assert re.search(rf"spmconvert {command} .*--recipe recipes/{file.name}", head)
    assert re.search(r"^# (Measured on|Not run: it needs)", head, re.MULTILINE)


def test_unknown_key_names_the_known_ones():
    with pytest.raises(RecipeError, match=r"unknown key 'design.stagez'; known keys are stages, variant"):
        load_recipe(None, {"design.stagez": 3})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("design.stages", -1, "--stages -1"),
        ("design.variant", "skew", "--variant skew"),
        ("seed", "x", "--seed x"),
        ("calibration.held_out", 1.5, "calibration.held_out 1.5 is not a share"),
        ("dtype", "int8", "--dtype int8"),
    ],
)
def test_value_out_of_range(key, value, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(None, {key: value})


def test_rotation_with_blocks_is_refused():
    with pytest.raises(RecipeError, match="rotation needs block 1"):
        load_recipe(None, {"design.variant": "rotation", "design.block": 2})


def test_terms_are_read_from_a_file(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(
        '[design]\nterms = [{kind = "spm", stages = 3}, {kind = "lowrank", rank = 8}]\n'
        '[[overrides]]\npattern = "*.down_proj"\nterms = [{kind = "sparse24"}]\n'
    )
    recipe = load_recipe(file, {})
    assert recipe.design.terms == ({"kind": "spm", "stages": 3}, {"kind": "lowrank", "rank": 8})
    assert recipe.overrides[0].terms == ({"kind": "sparse24"},)
    # numbers at their defaults say nothing
    assert load_recipe(None, {"design.terms": [{"kind": "sparse24"}], "design.rank": 0}).design.rank == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"design.terms": "sparse24"}, r"design\.terms"),
        ({"design.terms": []}, r"design\.terms.*at least 1"),
        ({"design.terms": ["sparse24"]}, r"design\.terms\.0"),
        ({"design.terms": [{}]}, r"kind None; choose among spm, "),
        ({"design.terms": [{"kind": "24"}]}, r"kind '24'; choose among spm, .*sparse24, lowrank"),
        ({"design.terms": [{"kind": "sparse24"}], "design.block": 2, "design.rank": 3}, "terms and block, rank are both"),
        ({"budget.keep": 0.5, "design.terms": [{"kind": "sparse24"}]}, "keep chooses the design of every layer"),
        ({"budget.keep": 0.5, "budget.structures": ["companion"]}, "companion is no kind of term; choose among spm"),
    ],
    ids=str,
)
def test_terms_that_are_no_terms(changes, words):
    with pytest.raises(RecipeError, match=words) as refused:
        load_recipe(None, changes)
    assert "\n" not in str(refused.value)


def test_short_keys_of_a_budget():
    given = {"speedup": 1.5, "tokens": 64, "rows": 2, "allow_slower": True, "structures": "sparse24, lowrank"}
    budget = recipe_from_keywords(given).budget
    assert (budget.speedup, budget.tokens, budget.rows, budget.allow_slower) == (1.5, 64, 2, True)
    assert budget.structures == ("sparse24", "lowrank")
    assert budget.batch_tokens == 128
    assert budget.limits == {"speedup": 1.5}


def test_later_changes_win_over_the_file(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('targets = ["attn"]\n[design]\nstages = 4\n[calibration]\nfile = "t.txt"\n')
    recipe = load_recipe(file, {"design.stages": 6})
    assert recipe.design.stages == 6
    assert recipe.targets == ("attn",)
    assert recipe.calibration.file == tmp_path / "t.txt"


@pytest.mark.parametrize("content", ["targets = [", "targets = 3", "[design]\nstages = 'many'"])
def test_bad_file(tmp_path, content):
    file = tmp_path / "r.toml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=r"r\.toml"):
        load_recipe(file, {})


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fit.iterations=30", ("fit.iterations", 30)),
        ("calibration.held_out=1e-1", ("calibration.held_out", 0.1)),
        ("allow_growth=true", ("allow_growth", True)),
        ("layers=4-10,-1", ("layers", "4-10,-1")),
        ('targets=["a=b"]', ("targets", ["a=b"])),
    ],
)
def test_assignment(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["fit.iterations", "=3"])
def test_assignment_without_form(text):
    with pytest.raises(RecipeError, match="key=value"):
        parse_assignment(text)


def test_assignment_through_a_value():
    with pytest.raises(RecipeError, match="not a table"):
        load_recipe(None, {"seed": 3, "seed.deep": 4})


def test_short_keywords():
    recipe = recipe_from_keywords({"targets": "mlp, attn", "stages": 5, "calib": "x.txt"})
    assert recipe.targets == ("mlp", "attn")
    assert recipe.design.stages == 5
    assert recipe.calibration.file == Path("x.txt")


def test_recipes_and_help_come_before_torch():
    code = (
        "import sys, spmconvert.cli.app, spmconvert.recipe.loading; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
