"""Moments of fitted rows know nothing of held-out ones, nor the other way round."""

import pytest
import torch

from spmconvert.calibrate.curvature import gather_curvatures
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.moments import gather_moments
from spmconvert.calibrate.statistics import collect
from spmconvert.commands.convert import open_plan, resolve_recipe
from spmconvert.data.calibration import load_rows
from spmconvert.model.loading import load_dense_model


@pytest.mark.parametrize("weighted", [False, True])
def test_each_part_is_gathered_from_its_own_rows(checkpoints, text, weighted):
    recipe = resolve_recipe(None, {"calib": text, "calibration.rows": 12, "calibration.batch_size": 5})
    source, plan, config = open_plan(str(checkpoints["gpt2"]), recipe)
    rows = load_rows(source.directory, config, recipe.calibration, seed=0)
    model = load_dense_model(source.directory, config, "cpu")
    told = []
    found = gather_moments(model, plan.layers, rows, lambda *done: told.append(done), weighted=weighted, seed=3)
    names = [layer.target.name for layer in plan.layers]
    assert list(found) == names
    expected = {part: collect(model, names, rows.batches(getattr(rows, part), model)) for part in ("fitted", "held_out")}
    for name in names:
        for part, statistics in expected.items():
            gathered = getattr(found[name], part)
            assert gathered.rows == statistics[name].rows == sum(map(len, getattr(rows, part)))
            assert torch.equal(gathered.mean, statistics[name].mean)
            assert torch.equal(gathered.scatter, statistics[name].scatter)
    # three batches of fitted rows, once more for the curvature, and one of held-out rows
    batches = 7 if weighted else 4
    assert told == [(done, batches) for done in range(1, batches + 1)]
    if not weighted:
        assert all(moments.metric is None for moments in found.values())
        return
    curvatures = gather_curvatures(model, names, rows.batches(rows.fitted, model), seed=3)
    for name in names:
        metric = OutputMetric.of(curvatures[name])
        assert torch.equal(found[name].metric.values, metric.values)
        assert torch.equal(found[name].metric.vectors, metric.vectors)
