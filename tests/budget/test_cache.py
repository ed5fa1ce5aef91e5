"""Names of kept curves: another one for everything that decides about a curve, the same one for what does not."""

import shutil

import pytest

from spmconvert.budget.cache import CacheIdentity, CurveCache
from spmconvert.commands.convert import open_plan, resolve_recipe
from spmconvert.data.documents import content_hash

DECIDING = {"keep": 0.5, "structures": "spm,sparse24,lowrank", "calibration.rows": 16, "budget.iterations": 4}
# each alone; another layer, structure, model or tokenizer is told apart elsewhere
CHANGES = [
    {"calibration.rows": 17},
    {"calibration.tokens": 32},
    {"calibration.held_out": 0.3},
    {"seed": 1},
    {"budget.iterations": 5},
    {"sensitivity": "kl"},
    {"output_weighting": False},
]


def names(directory, **changes):
    """Files of the first layer's curves, by part."""
    recipe = resolve_recipe(None, {**DECIDING, **changes})
    source, plan, _ = open_plan(str(directory), recipe)
    text = None if recipe.calibration.file is None else content_hash(recipe.calibration.file)
    cache = CurveCache.of(source, recipe, CacheIdentity.of_checkpoint(source, "cpu"), text)
    return {part: file.name for part, file in cache.files(plan.layers[0]).items()}


def assert_no_file_is_shared(some, others):
    assert some.keys() & others.keys()
    assert not set(some.values()) & set(others.values())


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_whatever_decides_about_a_curve_is_in_its_name(checkpoints, text, changes):
    base = names(checkpoints["gpt2"], calib=text)
    assert list(base) == ["lowrank", "terms", "response"]
    assert len(set(base.values())) == 3
    assert_no_file_is_shared(base, names(checkpoints["gpt2"], calib=text, **changes))


def test_another_text_in_the_same_place_is_another_curve(checkpoints, text, other_text, tmp_path):
    found = []
    for content in (text, other_text, text):
        shutil.copy(content, tmp_path / "text.txt")
        found.append(names(checkpoints["gpt2"], calib=tmp_path / "text.txt"))
    assert_no_file_is_shared(found[0], found[1])
    assert found[0] == found[2] == names(checkpoints["gpt2"], calib=text), "wherever the same text lies"
    assert_no_file_is_shared(found[0], names(checkpoints["gpt2"], sensitivity="none"))


def test_another_model_has_other_curves(checkpoints, text):
    found = [names(checkpoints[name], calib=text) for name in ("llama", "llama-tied", "llama-bf16")]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert_no_file_is_shared(found[first], found[second])


@pytest.mark.parametrize(
    "changes", [{"keep": 0.25}, {"keep": None, "keep_flops": 0.5}, {"fit.iterations": 7}, {"structures": "spm"}], ids=str
)
def test_budgets_and_final_fits_share_curves(checkpoints, text, changes):
    assert names(checkpoints["gpt2"], calib=text) == names(checkpoints["gpt2"], calib=text, **changes)
