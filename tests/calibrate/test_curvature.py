"""The measured curvature against what really happens to the model's outputs."""

import pytest
import torch
from torch.nn.functional import normalize

import spmconvert
from spmconvert.budget.candidates import predicted_loss
from spmconvert.calibrate import curvature as sensitivity
from spmconvert.calibrate.curvature import gather_curvatures
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import collect
from spmconvert.data.calibration import load_rows
from spmconvert.distill.loss import Distillation
from spmconvert.errors import CalibrationError
from spmconvert.model.architecture import load_config
from spmconvert.outputs.objective import objective_for, pooled
from spmconvert.recipe.recipe import Calibration, Training

LAYERS = {
    "gpt2": "transformer.h.1.mlp.c_fc",
    "bert": "encoder.layer.1.output.dense",
    "llama": "model.layers.0.mlp.up_proj",
}


@torch.no_grad()
def divergence(dense, changed, batches):
    distillation = Distillation(changed, dense, objective_for(dense.config), Training())
    losses = [distillation.loss(batch) for batch in batches]
    return sum(loss.total.item() for loss in losses) / sum(loss.positions for loss in losses)


@torch.no_grad()
def distance_of_rows(dense, changed, batches):
    """Mean squared distance of mean states at unit length."""
    found = []
    for batch in batches:
        means = [normalize(pooled(model(**batch)[0], batch), dim=-1) for model in (dense, changed)]
        found.append((means[0] - means[1]).square().sum(-1))
    return torch.cat(found).mean().item()


@pytest.mark.parametrize("name", LAYERS)
def test_predicted_loss_is_the_divergence_of_a_small_change(checkpoints, text, name):
    layer = LAYERS[name]
    dense, changed = (spmconvert.load(checkpoints[name], dtype=torch.float32).eval() for _ in range(2))
    config = load_config(checkpoints[name])
    rows = load_rows(checkpoints[name], config, Calibration(file=text, rows=48), seed=0)
    module, source = changed.get_submodule(layer), dense.get_submodule(layer)
    batches = list(rows.batches(rows.fitted, dense))
    metrics = [OutputMetric.of(gather_curvatures(dense, [layer], batches * 6, seed=seed)[layer]) for seed in (0, 1)]
    statistics = collect(dense, [layer], batches)[layer]
    torch.manual_seed(0)
    size = source.weight.detach().square().mean().sqrt()
    with torch.no_grad():
        module.weight.add_(0.03 * size * torch.randn_like(module.weight))
        own, other = (one.weight.detach().t() if name == "gpt2" else one.weight.detach() for one in (source, module))
        if module.bias is not None:
            # as a fit does: an error of the mean would add up over all tokens of a row
            module.bias.copy_(statistics.corrected_bias(own, other, source.bias))
    predicted = [predicted_loss(m, (own, source.bias), (other, module.bias), statistics) for m in metrics]
    measured = distance_of_rows(dense, changed, batches) if name == "bert" else divergence(dense, changed, batches)
    # inputs and gradients are not independent, so the prediction is one of size
    assert 0.4 * measured < predicted[0] < 2.5 * measured
    assert predicted[1] == pytest.approx(predicted[0], rel=0.15)


def test_gradients_of_parameters_are_left_alone(checkpoints, text):
    model = spmconvert.load(checkpoints["gpt2"], dtype=torch.float32)
    rows = load_rows(checkpoints["gpt2"], model.config, Calibration(file=text, rows=8), seed=0)
    found = gather_curvatures(model, [LAYERS["gpt2"]], rows.batches(rows.fitted, model), seed=0)
    again = gather_curvatures(model, [LAYERS["gpt2"]], rows.batches(rows.fitted, model), seed=0)
    assert torch.equal(found[LAYERS["gpt2"]], again[LAYERS["gpt2"]])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_layer_without_influence_is_named(checkpoints, text):
    model = spmconvert.load(checkpoints["gpt2"], dtype=torch.float32)
    rows = load_rows(checkpoints["gpt2"], model.config, Calibration(file=text, rows=8), seed=0)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.zero_()
    with pytest.raises(CalibrationError, match=r"h\.1\.mlp\.c_fc has no influence .*--ignore"):
        gather_curvatures(model, [LAYERS["gpt2"]], rows.batches(rows.fitted, model), seed=0)


def test_no_position_counts_for_more_than_a_few(checkpoints, text, monkeypatch):
    model = spmconvert.load(checkpoints["llama"], dtype=torch.float32)
    rows = load_rows(checkpoints["llama"], model.config, Calibration(file=text, rows=8), seed=0)
    layer = LAYERS["llama"]
    traces = []
    for clip in (1e-3, 1.0, 1e9):
        monkeypatch.setattr(sensitivity, "CLIP", clip)
        found = gather_curvatures(model, [layer], rows.batches(rows.fitted, model), seed=0)
        traces.append(found[layer].trace().item())
    assert traces[0] < 1e-4 * traces[1]
    assert traces[1] < 0.99 * traces[2]
