"""What a plan says about sizes before any weight is read."""

import pytest

from spmconvert.commands.convert import open_plan
from spmconvert.errors import OptionError, TargetError
from spmconvert.recipe.loading import recipe_from_keywords


def planned(checkpoint, **changes):
    return open_plan(str(checkpoint), recipe_from_keywords({"targets": "*.up_proj", **changes}))[1]


def test_bytes_of_a_planned_layer_are_numbers_positions_and_the_mark(checkpoints):
    terms = {"design.terms": [{"kind": "sparse24"}, {"kind": "lowrank", "rank": 2}]}
    layer = planned(checkpoints["llama"], **terms).layers[0]
    assert (layer.target.in_features, layer.target.out_features) == (32, 88)
    values, factors, positions = 88 * 16, 2 * (32 + 88), 88 * 4
    # without a calibration text there is no bias to add
    assert layer.parameters == values + factors
    assert layer.bytes == 4 * (values + factors + 1) + positions
    assert layer.flops == (2 * 32 * 88, 2 * 32 * 88 + 2 * factors)
    half = planned(checkpoints["llama-bf16"], **terms).layers[0]
    assert half.bytes == 2 * (values + factors + 1) + positions


def test_closed_forms_take_no_time(checkpoints):
    recipe = recipe_from_keywords({"targets": "mlp", "design.terms": [{"kind": "sparse24"}]})
    plan = open_plan(str(checkpoints["llama"]), recipe)[1]
    assert plan.predicted_seconds(recipe) == 0
    staged = recipe_from_keywords({"targets": "mlp"})
    assert open_plan(str(checkpoints["llama"]), staged)[1].predicted_seconds(staged) > 0


def test_numbers_and_terms_describe_the_same_design(checkpoints):
    by_numbers = planned(checkpoints["llama"], stages=3, block=2, rank=4)
    named = [{"kind": "lowrank", "rank": 4}, {"kind": "spm", "stages": 3, "block": 2}]
    by_terms = planned(checkpoints["llama"], **{"design.terms": named})
    assert by_numbers.layers == by_terms.layers


def test_a_sum_that_grows_a_layer_is_refused(checkpoints):
    terms = {"design.terms": [{"kind": "sparse24"}, {"kind": "lowrank", "rank": 20}]}
    with pytest.raises(TargetError, match="would not get smaller"):
        planned(checkpoints["llama"], **terms)
    assert planned(checkpoints["llama"], allow_growth=True, **terms).layers
    with pytest.raises(OptionError, match="at most"):
        planned(checkpoints["llama"], **{"design.terms": [{"kind": "lowrank", "rank": 33}]})
