"""What calibration rows say about layers, whatever dtype the model is in."""

import pytest
import torch

from spmconvert.calibrate.curvature import gather_curvatures
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.moments import gather_moments
from spmconvert.calibrate.statistics import collect
from spmconvert.commands.convert import open_plan, resolve_recipe
from spmconvert.data.calibration import calibration_rows, load_rows
from spmconvert.model.loading import in_float32, load, load_dense_model
from spmconvert.recipe.loading import recipe_from_keywords


def test_curvature_of_a_model_in_half_precision_is_that_of_its_weights_in_float32(checkpoints, text):
    recipe = recipe_from_keywords({"keep": 0.5, "calib": str(text), "calibration.rows": 12})
    source, plan, config = open_plan(str(checkpoints["llama-bf16"]), recipe)
    rows = calibration_rows(source.directory, config, recipe)
    gathered = []
    for dtype in (torch.bfloat16, torch.float32):
        model = load(checkpoints["llama-bf16"], dtype=dtype).eval()
        moments = gather_moments(model, plan.layers, rows, lambda *_: None, weighted=True, seed=0)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        gathered.append([moments[layer.target.name].metric for layer in plan.layers])
    for half, whole in zip(*gathered, strict=True):
        torch.testing.assert_close(half.values, whole.values, rtol=0, atol=0)
        torch.testing.assert_close(half.vectors, whole.vectors, rtol=0, atol=0)


def test_a_model_comes_back_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4).half(), torch.nn.BatchNorm1d(4)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with in_float32(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model(torch.randn(5, 3)).dtype == torch.float32
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("part", ["held_out", "choosing"])
def test_each_part_is_gathered_from_its_own_rows(checkpoints, text, weighted, part):
    recipe = resolve_recipe(None, {"calib": text, "calibration.rows": 12, "calibration.batch_size": 5})
    source, plan, config = open_plan(str(checkpoints["gpt2"]), recipe)
    rows = load_rows(source.directory, config, recipe.calibration, seed=0, choosing=True)
    model = load_dense_model(source.directory, config, "cpu")
    told = []
    options = {"choosing": part == "choosing", "weighted": weighted, "seed": 3}
    found = gather_moments(model, plan.layers, rows, lambda *done: told.append(done), **options)
    names = [layer.target.name for layer in plan.layers]
    assert list(found) == names
    parts = {"fitted": rows.fitted, "measured": getattr(rows, part)}
    expected = {key: collect(model, names, rows.batches(drawn, model)) for key, drawn in parts.items()}
    for name in names:
        for key, statistics in expected.items():
            gathered = getattr(found[name], key)
            assert gathered.rows == statistics[name].rows == sum(map(len, parts[key]))
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
