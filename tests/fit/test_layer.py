"""What is said of a fitted layer, and what may not be saved."""

import pytest

from spmconvert.commands.convert import open_plan
from spmconvert.errors import FitError
from spmconvert.fit import layer as layer_fit
from spmconvert.fit.layer import fit_layer
from spmconvert.recipe.loading import recipe_from_keywords


def fit(checkpoint, **changes):
    recipe = recipe_from_keywords({"targets": "re:.*0.mlp.(c_fc|up_proj)", **changes})
    source, plan, _ = open_plan(str(checkpoint), recipe)
    (planned,) = plan.layers
    weight = source.read(planned.weight).float()
    return fit_layer(planned, weight.t() if planned.spec.fan_in_fan_out else weight, None, None, iterations=30, seed=0)


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


def test_the_warning_stands_in_the_line_of_the_layer(run, checkpoints, tmp_path):
    code, out, _ = run("convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--set", "fit.iterations=2")
    assert code == 0
    lines = [line for line in out.splitlines() if "mlp.c_fc" in line]
    assert len(lines) == 2
    assert all("times less error" in line for line in lines), out
