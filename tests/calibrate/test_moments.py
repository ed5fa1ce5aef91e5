"""What calibration rows say about layers, whatever dtype the model is in."""

import torch

from spmconvert.calibrate.moments import gather_moments
from spmconvert.commands.convert import open_plan
from spmconvert.data.calibration import calibration_rows
from spmconvert.model.loading import in_float32, load
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
