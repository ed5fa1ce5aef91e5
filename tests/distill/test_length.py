"""How many steps a run plans, and its rate, where nobody says so."""

import pytest

from spmconvert.data.training import BUCKET_STEPS, step_indices
from spmconvert.distill.length import (
    FEW_ROWS,
    MOST_TRAINED,
    ROWS,
    planned_steps,
    settled_rate,
    settled_rows,
    settled_scope,
    typical_step,
)
from spmconvert.errors import RecipeError
from spmconvert.recipe.loading import training_from_keywords
from spmconvert.recipe.recipe import MINUTES, STEPS, Training


@pytest.mark.parametrize(
    ("given", "planned"),
    [
        # 15 minutes less two measurements of 30 s are 840 s, a step and its share of a measurement takes 8.6
        ({}, 97),
        ({"minutes": 2}, 6),
        ({"minutes": 2, "steps": 3}, 3),
        # a minute that measurements alone use up
        ({"minutes": 0.5}, 1),
        ({"steps": 4000}, 4000),
    ],
)
def test_steps_that_fit(given, planned):
    assert planned_steps(Training(batch_size=16, **given), lambda: 8.0, measuring=30.0) == planned


def test_fast_machines_end_by_steps_where_nothing_is_given():
    assert planned_steps(Training(batch_size=16), lambda: 1e-3, measuring=0.0) == STEPS
    assert planned_steps(Training(batch_size=4), lambda: 1e-3, measuring=0.0) == 4 * STEPS, "as much text"
    assert planned_steps(Training(batch_size=64), lambda: 1e-3, measuring=0.0) == STEPS
    assert planned_steps(Training(minutes=60, steps=9, batch_size=4), lambda: 1e-3, measuring=0.0) == 9
    assert planned_steps(Training(minutes=1, batch_size=16), lambda: 1e-2, measuring=0.0) == 6000
    assert Training().most_minutes == MINUTES


def test_named_steps_are_not_timed():
    def step():
        raise AssertionError

    assert planned_steps(Training(steps=7), step, measuring=0.0) == 7


class Lengths:
    """Rows of given lengths."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]


def test_a_step_of_mean_length_is_timed():
    """Steps are of rows of one length each: the first alone may be of the longest, and plan half of what fits."""
    rows = Lengths([10] * 400 + [50] * 400 + [200] * 100)
    training = Training(batch_size=4)
    counts = [sum(map(rows.size, step_indices(rows, 4, step, training.seed))) for step in range(BUCKET_STEPS)]
    mean = sum(counts) / len(counts)
    chosen = counts[typical_step(rows, training)]
    assert abs(chosen - mean) == min(abs(count - mean) for count in counts)
    assert max(counts) > 2 * chosen


def test_rates_fall_with_what_was_kept_and_for_states():
    assert settled_rate(0.1, "logits", 16) > settled_rate(0.3, "logits", 16) == settled_rate(1.2, "logits", 16)
    assert settled_rate(0.5, "hidden", 16) < settled_rate(0.5, "logits", 16)
    assert settled_rate(0.5, "hidden", 16) < settled_rate(0.1, "hidden", 16)


def test_steps_of_few_rows_have_a_lower_rate_where_words_are_compared():
    assert settled_rate(0.5, "logits", FEW_ROWS) == pytest.approx(3e-4)
    assert settled_rate(0.5, "logits", FEW_ROWS + 1) == pytest.approx(1e-3)
    assert settled_rate(0.5, "hidden", FEW_ROWS) == settled_rate(0.5, "hidden", ROWS)


@pytest.mark.parametrize(
    ("objective", "device", "processes", "accumulation", "rows"),
    [
        ("logits", "cpu", 1, 1, FEW_ROWS),
        ("logits", "cpu", 1, 8, 8),
        ("logits", "cpu", 2, 1, ROWS),
        ("logits", "cuda:1", 1, 1, ROWS),
        ("hidden", "cpu", 1, 1, ROWS),
        ("hidden", "cpu", 1, 32, 32),
        ("classes", "cpu", 1, 1, ROWS),
    ],
)
def test_a_language_model_on_a_cpu_takes_small_steps(objective, device, processes, accumulation, rows, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert settled_rows(objective, device, accumulation) == rows


def test_measurements_are_as_many_rows_apart_whatever_a_step_has():
    assert [Training(batch_size=rows).measured_every for rows in (4, 16, 2000)] == [200, 50, 1]
    assert Training(batch_size=4, evaluate_every=7).measured_every == 7


def test_guided_steps_have_to_be_named():
    with pytest.raises(RecipeError, match="none are named"):
        training_from_keywords({"guided": 0.3})
    assert training_from_keywords({"guided": 0.3, "steps": 10}).most_steps == 10


def test_all_of_an_encoder_is_trained_unless_it_is_large():
    assert settled_scope("hidden", MOST_TRAINED) == "all"
    assert settled_scope("hidden", MOST_TRAINED + 1) == "spm"
    assert settled_scope("logits", 1) == settled_scope("classes", 1) == settled_scope("scores", 1) == "spm"
