"""The loop on a student of one SPM layer: what the optimizer is given at every step, and when a run ends early."""

import copy

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.data.training import TokenRows, TrainingData
from spmconvert.distill import loop
from spmconvert.distill.distributed import make_accelerator
from spmconvert.distill.guide import Guide
from spmconvert.distill.loop import TrainingRun, measure, parameter_groups, train
from spmconvert.distill.loss import Distillation
from spmconvert.distill.parameters import choose_trained, converted_layers, structured_parameters
from spmconvert.fit.solver import fit_
from spmconvert.model.swap import replace_module
from spmconvert.operator.linear import SPMLinear
from spmconvert.recipe.recipe import Training
from tests.conftest import VOCABULARY, gpt2_config

LAYER = "transformer.h.0.mlp.c_fc"
SHORT = {"steps": 10, "batch_size": 4, "evaluate_every": 5, "learning_rate": 1e-3, "precision": "fp32"}


class Watched(torch.optim.AdamW):
    """Notes what every step is given: rate and decay of every parameter, its gradient, and its value afterwards."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = []
        type(self).latest = self

    def step(self, *arguments, **options):
        groups = {id(p): (group["lr"], group["weight_decay"]) for group in self.param_groups for p in group["params"]}
        gradients = {number: p.grad.clone() for number, p in self.by_id().items()}
        super().step(*arguments, **options)
        self.seen.append((groups, gradients, {number: p.detach().clone() for number, p in self.by_id().items()}))

    def by_id(self):
        return {id(p): p for group in self.param_groups for p in group["params"]}


@pytest.fixture
def optimizer(monkeypatch):
    """The class of the optimizer; ``latest`` is the one of the last run."""
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    return Watched


def rows(count, seed):
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (count, 12), dtype=np.int32)
    return TokenRows(ids.reshape(-1), 12 * np.arange(1, count + 1), padding=1)


@pytest.fixture
def make_run(tmp_path):
    """Builds a run of a tiny GPT-2 in which one layer is converted."""

    def make(**changes):
        training = Training(**{**SHORT, **changes})
        torch.manual_seed(0)
        teacher = GPT2LMHeadModel(gpt2_config(n_layer=1, architectures=["GPT2LMHeadModel"])).eval().requires_grad_(False)
        student = copy.deepcopy(teacher)
        dense, layer = teacher.get_submodule(LAYER), SPMLinear(32, 128)
        fit_(layer, 4 * dense.weight.t(), dense.bias, ActivationStatistics.isotropic(32), iterations=3)
        replace_module(student, LAYER, layer)
        with torch.no_grad():
            dense.weight.mul_(4)
        return TrainingRun(
            distillation=Distillation(student, teacher, "logits", training, converted_layers(student)),
            data=TrainingData(rows(40, 0), rows(6, 1), ""),
            training=training,
            accelerator=make_accelerator(training, "cpu", shard=False, tracker=None, output=tmp_path / "o"),
            called=student,
            trained=choose_trained(student, training),
            structured=frozenset(structured_parameters(student)),
            save=lambda _: None,
            report=lambda _: None,
        )

    return make


def test_rates_warm_up_and_fall_on_a_cosine(make_run, optimizer):
    run = make_run(warm_up=0.2, learning_rate=2e-3)
    train(run)
    number = id(run.trained[f"{LAYER}.spm.weight"])
    rates = [groups[number][0] / 2e-3 for groups, _, _ in optimizer.latest.seen]
    # two steps up, then half a period of a cosine over eight
    cosine = [0.5 * (1 + np.cos(np.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([0.5, 1.0, *cosine])
    assert cosine[4] == pytest.approx(0.5)


def test_every_parameter_is_trained_at_the_rate_and_decay_of_its_kind(make_run, optimizer):
    run = make_run(train="all", learning_rate=2e-3, other_learning_rate=3e-4, weight_decay=0.125, warm_up=0.1)
    train(run)
    # at the end of the warm-up of one step every rate is at its peak
    groups = optimizer.latest.seen[0][0]
    found = {name: groups[id(parameter)] for name, parameter in run.trained.items()}
    inside = {name for name in found if name.startswith(LAYER)}
    assert {f"{LAYER}.{part}" for part in ("spm.weight", "spm.scale_in", "spm.scale_out", "bias")} == inside
    for name, (rate, decay) in found.items():
        matrix = run.trained[name].ndim > 1
        expected = (2e-3, 0.0) if name in inside else (3e-4, 0.125 if matrix else 0.0)
        assert (rate, decay) == pytest.approx(expected), name
    assert {"transformer.wte.weight", "transformer.h.0.ln_1.weight"} <= found.keys() - inside


def test_groups_hold_every_parameter_once_and_none_is_empty(make_run):
    run = make_run(train="norms")
    groups = parameter_groups(run.trained, run.structured, run.training)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, run.trained.values()))
    # no dense matrix is trained
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0]


def test_gradients_are_no_longer_than_the_clip(make_run, optimizer):
    norms = []
    for clip in (1e-4, 1e3):
        train(make_run(clip=clip, steps=3, evaluate_every=3))
        steps = [torch.cat([gradient.flatten() for gradient in seen[1].values()]) for seen in optimizer.latest.seen]
        norms.append([gradient.norm().item() for gradient in steps])
    assert norms[0] == pytest.approx([1e-4] * 3, rel=1e-3)
    assert min(norms[1]) > 1e-3


def test_what_is_measured_and_kept_is_the_average_of_the_steps(make_run, optimizer):
    run = make_run(ema=0.6, steps=4, evaluate_every=4)
    state = train(run)
    assert state.history[-1]["held_out_loss"] < state.history[0]["held_out_loss"]
    # the newest value weighs 0.4, from the second on
    values = [{name: after[id(p)] for name, p in run.trained.items()} for _, _, after in optimizer.latest.seen]
    weights = (0.6**3, 0.4 * 0.6**2, 0.4 * 0.6, 0.4)
    for name in run.trained:
        expected = sum(weight * value[name] for weight, value in zip(weights, values, strict=True))
        torch.testing.assert_close(state.best[name], expected)
        assert torch.equal(run.trained[name], values[-1][name]), "training goes on from the last step"


def test_first_steps_are_guided_by_the_dense_layers(make_run):
    losses = []
    run = make_run(steps=8, evaluate_every=8)
    run.guide = Guide(run.distillation.student, run.distillation.teacher, [LAYER], steps=4)
    run.report = lambda record: losses.append(record["loss"]) if "loss" in record else None
    state = train(run)
    # all of the dense output, which is the teacher; then shares of 0.85, 0.5, 0.15 and none
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[0] < losses[1] < losses[2] < losses[3]
    assert min(losses[4:]) > 0.1 * state.history[0]["held_out_loss"]
    assert state.history[0]["held_out_loss"] > 1e-3, "measured without the guide"


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        # above the start in the second half, twice in a row
        ([1.0, 0.9, 1.2, 1.1, 0.9], 15),
        # in the first half the rate is still high
        ([1.0, 1.5, 1.6, 0.9, 0.8], 20),
        ([1.0, 1.5, 1.1, 1.2, 0.8], 15),
        # once is not twice
        ([1.0, 0.9, 1.2, 0.9, 1.2], 20),
        # as often as it likes where the start is not exceeded
        ([1.0, 0.5, 0.9, 0.95, 1.0], 20),
        # far above it at any time, or no number
        ([1.0, 4.1, 0.5, 0.5, 0.5], 5),
        ([1.0, 3.9, 0.5, 0.5, 0.5], 20),
        ([1.0, float("nan"), 0.5, 0.5, 0.5], 5),
    ],
    ids=str,
)
def test_a_run_that_stays_above_its_start_ends_there(make_run, monkeypatch, losses, steps):
    run = make_run(steps=20)
    run.state.planned = 20
    left = iter(losses)
    monkeypatch.setattr(loop, "held_out_losses", lambda _: {"held_out_loss": next(left)})
    for step in range(0, 25, 5):
        run.state.step = step
        measure(run)
        if run.state.stopped:
            break
    assert run.state.step == steps
    assert bool(run.state.stopped) == (steps < 20)
    if run.state.stopped:
        assert run.state.stopped.endswith(f"to {losses[steps // 5]:.4g} at step {steps}")


@pytest.mark.parametrize(("batch", "processes", "accumulation"), [(9, 2, 4), (16, 1, 3), (7, 3, 2), (8, 2, 4), (5, 1, 5)])
def test_every_process_has_as_many_parts(batch, processes, accumulation):
    rows = list(range(batch))
    parts = [list(loop._parts(rows[process::processes], accumulation)) for process in range(processes)]
    # sharded parameters are gathered once a part, by all processes together
    assert {len(of_process) for of_process in parts} == {accumulation}
    assert sorted(row for of_process in parts for part in of_process for row in part) == rows
    sizes = [len(part) for of_process in parts for part in of_process]
    assert max(sizes) - min(sizes) <= 2
    assert min(sizes) >= 1
