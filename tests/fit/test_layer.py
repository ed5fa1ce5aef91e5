"""What is said of a fitted layer, and what may not be saved."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import spmconvert
from spmconvert.calibrate.moments import gather_moments
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.calibrate.store import Moments, MomentStore
from spmconvert.commands.convert import open_plan, resolve_recipe
from spmconvert.data.calibration import load_rows
from spmconvert.errors import FitError
from spmconvert.fit import layer as layer_fit
from spmconvert.fit.layer import fit_layer
from spmconvert.fit.stored import chain_of
from spmconvert.model.loading import DenseModel
from spmconvert.operator.factors import covariance_root, truncated_svd
from spmconvert.recipe.loading import recipe_from_keywords


def fit(checkpoint, moments=None, **changes):
    recipe = recipe_from_keywords({"targets": "re:.*0.mlp.(c_fc|up_proj)", **changes})
    source, plan, _ = open_plan(str(checkpoint), recipe)
    (planned,) = plan.layers
    weight = source.read(planned.weight).float()
    return fit_layer(planned, weight.t() if planned.spec.fan_in_fan_out else weight, None, moments, iterations=30, seed=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_layer_that_rounding_destroys_is_not_saved(checkpoints, monkeypatch, dtype):
    # measured before rounding, held out, of the baseline, and fitted
    queue = [0.1, 547.6, 0.1, 547.6]
    monkeypatch.setattr(layer_fit, "measure_error", lambda *_: layer_fit.LayerError(queue[0], queue.pop(0)))
    with pytest.raises(FitError, match=rf"up_proj has an error of 0\.1 and, rounded to {dtype}, of 548; .*--dtype float32"):
        fit(checkpoints["llama"], dtype=dtype, stages=2, rank=2)


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ((0.1, 0.1, 0.1, 0.1), ""),
        ((0.1, 0.1, 0.1, 0.3), "rounding to float32 takes its error from 0.1 to 0.3"),
        ((0.9, 1.2, 0.3, 0.9), "worse than its mean output alone"),
        ((0.5, 0.6, 0.2, 0.5), "SVD of the same size has 3.0 times less error"),
    ],
)
def test_a_layer_that_is_worth_little_says_so(checkpoints, monkeypatch, errors, words):
    queue = list(errors)
    monkeypatch.setattr(layer_fit, "measure_error", lambda *_: layer_fit.LayerError(queue[0], queue.pop(0)))
    _, record = fit(checkpoints["gpt2"], stages=2, rank=2)
    assert record.warning == words


def test_a_layer_whose_moments_are_singular_is_named(checkpoints):
    scatter = torch.eye(32)
    scatter[0, 0] = -1e-2
    broken = replace(ActivationStatistics.isotropic(32), scatter=scatter)
    moments = replace(Moments.isotropic(32), fitted=broken)
    _, record = fit(checkpoints["gpt2"], moments, stages=0, rank=24)
    assert (
        record.warning == "second moments of its inputs are singular, fitted with 1e-01 of their mean added to the diagonal"
    )


def test_the_warning_stands_in_the_line_of_the_layer(run, checkpoints, tmp_path):
    few = ["--calib", "none", "--stages", "7", "--set", "fit.iterations=2"]
    code, out, _ = run("convert", checkpoints["gpt2"], "-o", tmp_path / "o", *few)
    assert code == 0
    lines = [line for line in out.splitlines() if "mlp.c_fc" in line]
    assert len(lines) == 2
    assert all("times less error" in line for line in lines), out


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
        "refine": 0,
    }
    spmconvert.convert(checkpoints["gpt2"], tmp_path / "out", **changes)
    found = spmconvert.load(tmp_path / "out").get_submodule(LAYER).to_dense().detach()
    recipe = resolve_recipe(None, changes)
    source, plan, config = open_plan(str(checkpoints["gpt2"]), recipe)
    model = spmconvert.load(checkpoints["gpt2"], dtype=torch.float32)
    rows = load_rows(source.directory, config, recipe.calibration, recipe.seed)
    store = MomentStore(tmp_path / "moments")
    dense = DenseModel(source.directory, config, "cpu")
    chain = partial(chain_of, dense, plan, rows)
    # probes go by the batch, and batches by the way that rows are taken
    gather_moments(dense, plan.layers, rows, store, lambda *_: None, chain=chain, weighted=True, seed=recipe.seed)
    moments = store.read(LAYER)
    weight, root = model.get_submodule(LAYER).weight.detach().t(), covariance_root(moments.fitted.covariance)

    def energy(matrix):
        missed = root @ (weight - matrix).t()
        return (moments.metric.energy(missed) if weighted else missed.square().sum()).item()

    best, other = (
        torch.matmul(*truncated_svd(weight, root, 4, metric))
        for metric in ((moments.metric, None) if weighted else (None, moments.metric))
    )
    assert energy(found) == pytest.approx(energy(best), rel=1e-3)
    assert energy(best) < 0.95 * energy(other)
