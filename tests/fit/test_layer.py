"""A final fit against the best matrix of its rank, on the moments that the recipe asks for."""

import pytest
import torch

import spmconvert
from spmconvert.calibrate.moments import gather_moments
from spmconvert.commands.convert import open_plan, resolve_recipe
from spmconvert.data.calibration import load_rows
from spmconvert.fit.lowrank import covariance_root, truncated_svd

LAYER = "transformer.h.0.mlp.c_fc"


@pytest.mark.parametrize("weighted", [True, False])
def test_fits_weigh_outputs_where_the_recipe_says_so(checkpoints, text, tmp_path, weighted):
    changes = {
        "calib": text,
        "targets": LAYER,
        "stages": 0,
        "rank": 4,
        "calibration.rows": 16,
        "output_weighting": weighted,
    }
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "out", **changes)
    found = spmconvert.load(tmp_path / "out").get_submodule(LAYER).to_dense().detach()
    recipe = resolve_recipe(None, changes)
    source, plan, config = open_plan(str(checkpoints["gpt2"]), recipe)
    model = spmconvert.load(checkpoints["gpt2"], dtype=torch.float32)
    rows = load_rows(source.directory, config, recipe.calibration, recipe.seed)
    moments = gather_moments(model, plan.layers, rows, lambda *_: None, weighted=True, seed=recipe.seed)[LAYER]
    weight, root = model.get_submodule(LAYER).weight.detach().t(), covariance_root(moments.fitted.covariance)

    def energy(matrix):
        missed = root @ (weight - matrix).t()
        return (moments.metric.energy(missed) if weighted else missed.square().sum()).item()

    best, other = (
        torch.matmul(*truncated_svd(weight, root, 4, metric))
        for metric in ((moments.metric, None) if weighted else (None, moments.metric))
    )
    # the diagonals of an SPM layer are worth less than half a percent of it
    assert 0.995 * energy(best) <= energy(found) <= 1.001 * energy(best) < 0.95 * energy(other)
