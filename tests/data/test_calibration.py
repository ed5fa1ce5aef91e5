"""Calibration rows: what is fitted and what only measures are apart, and follow from the seed."""

import pytest

from spmconvert.data.calibration import load_rows
from spmconvert.errors import CalibrationError
from spmconvert.model.architecture import load_config
from spmconvert.recipe.recipe import Calibration

PARTS = ("fitted", "choosing", "held_out", "unused")


def split(directory, text, seed=0, *, choosing=False, **changes):
    """Rows by part, as tuples of tokens."""
    found = load_rows(directory, load_config(directory), Calibration(file=text, **changes), seed, choosing=choosing)
    return {part: [tuple(row.tolist()) for row in getattr(found, part)] for part in PARTS}


@pytest.mark.parametrize(("wanted", "counts"), [(40, (40, 4)), (250, (250, 25)), (10_000, (270, 30))])
def test_every_row_of_the_text_is_in_one_part(checkpoints, text, wanted, counts):
    # a row a line, and no two lines are alike
    found = split(checkpoints["bert"], text, rows=wanted, held_out=0.1)
    assert (len(found["fitted"]), len(found["held_out"])) == counts
    together = [row for part in PARTS for row in found[part]]
    assert len(together) == len(set(together)) == 300


def test_parts_follow_from_the_seed(checkpoints, text):
    found = [split(checkpoints["bert"], text, seed, rows=40) for seed in (3, 3, 4)]
    assert found[0] == found[1]
    assert set(found[0]["held_out"]) != set(found[2]["held_out"])
    assert set(found[0]["fitted"]) != set(found[2]["fitted"])


def test_a_row_is_left_to_fit(checkpoints, tmp_path):
    (tmp_path / "short.txt").write_text("one\ntwo\nthree")
    found = split(checkpoints["bert"], tmp_path / "short.txt", held_out=0.9)
    assert [len(found[part]) for part in PARTS] == [1, 0, 2, 0]
    found = split(checkpoints["bert"], tmp_path / "short.txt", held_out=0.9, choosing=True)
    assert [len(found[part]) for part in PARTS] == [1, 1, 1, 0]
    (tmp_path / "shorter.txt").write_text("one\ntwo")
    with pytest.raises(CalibrationError, match=r"2 rows of .* 3 are needed, one to fit, one to choose on and one held out"):
        split(checkpoints["bert"], tmp_path / "shorter.txt", choosing=True)


@pytest.mark.parametrize(("wanted", "counts"), [(40, (40, 4, 4)), (250, (250, 25, 25)), (10_000, (240, 30, 30))])
def test_designs_are_chosen_on_rows_of_their_own(checkpoints, text, wanted, counts):
    found = split(checkpoints["bert"], text, rows=wanted, held_out=0.1, choosing=True)
    assert tuple(len(found[part]) for part in PARTS[:3]) == counts
    together = [row for part in PARTS for row in found[part]]
    assert len(together) == len(set(together)) == 300
    # the rows that measure are the same, so that a budget is compared with designs by hand on equal rows
    assert found["held_out"] == split(checkpoints["bert"], text, rows=wanted, held_out=0.1)["held_out"]
