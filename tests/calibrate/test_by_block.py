"""Calibration of one block at a time finds what the whole model in memory does."""

import pytest
import torch

from spmconvert.calibrate import by_block
from spmconvert.calibrate import moments as moments_module
from spmconvert.calibrate.moments import gather_moments
from spmconvert.calibrate.store import PARTS, MomentStore
from spmconvert.commands.convert import open_plan, resolve_recipe
from spmconvert.data.calibration import load_rows
from spmconvert.errors import CalibrationError
from spmconvert.fit.stored import chain_of
from spmconvert.model import states
from spmconvert.model.loading import DenseModel, load_dense_model


def opened(checkpoints, text, name, folder=None, **changes):
    recipe = resolve_recipe(None, {"calib": text, "calibration.rows": 12, "calibration.batch_size": 4, **changes})
    source, plan, config = open_plan(str(checkpoints[name]), recipe)
    rows = load_rows(source.directory, config, recipe.calibration, seed=0, choosing=True)
    dense = DenseModel(source.directory, config, "cpu", folder)
    return plan, rows, dense, load_dense_model(source.directory, config, "cpu")


def gather(store, plan, rows, model, chain, weighted=True, report=lambda *_: None):
    gather_moments(lambda: model, plan.layers, rows, store, report, chain=chain, weighted=weighted, seed=3)
    return {layer.target.name: store.read(layer.target.name) for layer in plan.layers}


@pytest.mark.parametrize("mapped", ["nothing", "what is differentiated", "what moves on"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("gpt2", "mlp"), ("bert", "mlp"), ("llama-bf16", "mlp,attn"), ("llama", "*.1.mlp.up_proj"), ("mixtral", "attn")],
)
def test_it_is_what_the_whole_model_gives(checkpoints, text, tmp_path, monkeypatch, name, targets, weighted, mapped):
    if mapped != "nothing":
        monkeypatch.setattr(by_block if mapped == "what is differentiated" else states, "STATES_LIMIT", 0)
    # clipping goes by the batch
    monkeypatch.setattr(moments_module, "GRADIENT_TOKENS", 512)
    plan, rows, dense, model = opened(checkpoints, text, name, tmp_path, targets=targets)
    whole = gather(MomentStore(tmp_path / "whole"), plan, rows, model, lambda: None, weighted)
    told = []
    store = MomentStore(tmp_path / "blocks")
    found = gather(store, plan, rows, None, lambda: chain_of(dense, plan, rows), weighted, lambda *done: told.append(done))
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)]
    for layer, moments in found.items():
        for part in PARTS:
            one, other = getattr(moments, part), getattr(whole[layer], part)
            assert one.rows == other.rows
            torch.testing.assert_close(one.mean, other.mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.scatter, other.scatter, rtol=1e-3, atol=1e-3)
        assert (moments.metric is None) == (not weighted)
        if weighted:
            one, other = (
                m.metric.vectors @ (m.metric.values[:, None] * m.metric.vectors.t()) for m in (moments, whole[layer])
            )
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
            assert moments.metric.level == pytest.approx(whole[layer].metric.level, rel=1e-3)


def test_a_run_that_goes_on_ends_with_the_same_bytes(checkpoints, text, tmp_path, monkeypatch):
    plan, rows, dense, _ = opened(checkpoints, text, "llama")

    def chain():
        return chain_of(dense, plan, rows)

    gather(MomentStore(tmp_path / "whole"), plan, rows, None, chain)
    stopped, finish = MomentStore(tmp_path / "parts"), MomentStore.finish

    def stop(self, name, metric):
        finish(self, name, metric)
        if "layers.0" in name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MomentStore, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            gather(stopped, plan, rows, None, chain)
    assert 0 < sum(layer.target.name in stopped for layer in plan.layers) < len(plan.layers)
    gather(stopped, plan, rows, None, chain)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "parts")]
    assert files[0] == files[1]
    with monkeypatch.context() as patch:
        patch.setattr(moments_module, "BlockCalibration", lambda *_: pytest.fail("gathered twice"))
        gather(stopped, plan, rows, None, lambda: pytest.fail("loaded for nothing"))


def test_large_blocks_are_gathered_in_groups(checkpoints, text, tmp_path, monkeypatch):
    plan, rows, dense, _ = opened(checkpoints, text, "llama", targets="mlp")
    found = []
    for folder in ("one", "many"):
        found.append(gather(MomentStore(tmp_path / folder), plan, rows, None, lambda: chain_of(dense, plan, rows)))
        monkeypatch.setattr("spmconvert.plan.plan.STATISTICS_BUDGET", 1)
    for name, moments in found[0].items():
        assert torch.equal(moments.fitted.scatter, found[1][name].fitted.scatter)
        assert torch.equal(moments.metric.values, found[1][name].metric.values)


def test_layers_without_influence_are_named(checkpoints, text, tmp_path):
    plan, rows, dense, _ = opened(checkpoints, text, "gpt2")
    chain = chain_of(dense, plan, rows)
    block = chain.block

    def silenced(index):
        found = block(index)
        if index == 1:
            with torch.no_grad():
                found.mlp.c_proj.weight.zero_()
        return found

    chain.block = silenced
    with pytest.raises(CalibrationError, match=r"h\.1\.mlp\.c_fc has no influence .* --ignore"):
        gather(MomentStore(tmp_path), plan, rows, None, lambda: chain)
