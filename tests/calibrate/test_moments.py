"""What calibration rows say about layers, whatever dtype the model is in, and where it is kept."""

import pytest
import torch

from spmconvert.calibrate import moments as moments_module
from spmconvert.calibrate.curvature import gather_curvatures
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.moments import gather_moments
from spmconvert.calibrate.statistics import ActivationStatistics, collect
from spmconvert.calibrate.store import PARTS, MomentStore, moment_bytes
from spmconvert.commands.convert import open_plan, resolve_recipe
from spmconvert.data.calibration import calibration_rows, load_rows
from spmconvert.model.loading import in_float32, load, load_dense_model
from spmconvert.recipe.loading import recipe_from_keywords


def unwatched(*_):
    """Nobody is told."""


def test_curvature_of_a_model_in_half_precision_is_that_of_its_weights_in_float32(checkpoints, text, tmp_path):
    recipe = recipe_from_keywords({"keep": 0.5, "calib": str(text), "calibration.rows": 12})
    source, plan, config = open_plan(str(checkpoints["llama-bf16"]), recipe)
    rows = calibration_rows(source.directory, config, recipe)
    gathered = []
    for dtype in (torch.bfloat16, torch.float32):
        model = load(checkpoints["llama-bf16"], dtype=dtype).eval()
        store = MomentStore(tmp_path / str(dtype))
        gather_moments(lambda model=model: model, plan.layers, rows, store, unwatched, weighted=True, seed=0)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        gathered.append([store.read(layer.target.name).metric for layer in plan.layers])
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


def opened(checkpoints, text, choosing=True):
    recipe = resolve_recipe(None, {"calib": text, "calibration.rows": 12, "calibration.batch_size": 5})
    source, plan, config = open_plan(str(checkpoints["gpt2"]), recipe)
    rows = load_rows(source.directory, config, recipe.calibration, seed=0, choosing=choosing)
    return plan, rows, load_dense_model(source.directory, config, "cpu")


@pytest.mark.parametrize("weighted", [False, True])
def test_each_part_is_gathered_from_its_own_rows_in_one_run(checkpoints, text, tmp_path, monkeypatch, weighted):
    monkeypatch.setattr(moments_module, "GRADIENT_TOKENS", 512)
    plan, rows, model = opened(checkpoints, text)
    told = []
    store = MomentStore(tmp_path)
    gather_moments(lambda: model, plan.layers, rows, store, lambda *done: told.append(done), weighted=weighted, seed=3)
    names = [layer.target.name for layer in plan.layers]
    expected = {part: collect(model, names, rows.batches(getattr(rows, part), model)) for part in PARTS}
    found = {name: store.read(name) for name in names}
    for name in names:
        for part, statistics in expected.items():
            gathered = getattr(found[name], part)
            assert gathered.rows == statistics[name].rows == sum(map(len, getattr(rows, part)))
            if weighted and part == "fitted":
                # through the whole model and with a graph, which may round otherwise
                torch.testing.assert_close(gathered.mean, statistics[name].mean, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(gathered.scatter, statistics[name].scatter, rtol=1e-4, atol=1e-3)
            else:
                assert torch.equal(gathered.mean, statistics[name].mean)
                assert torch.equal(gathered.scatter, statistics[name].scatter)
    # batches of 5 rows: every row goes through once, for the curvature too
    assert told == [(done, 16) for done in (2, 4, 9, 14, 16)]
    if not weighted:
        assert all(moments.metric is None for moments in found.values())
        return
    curvatures = gather_curvatures(model, names, rows.batches(rows.fitted, model), seed=3)
    for name in names:
        metric = OutputMetric.of(curvatures[name])
        assert torch.equal(found[name].metric.values, metric.values)
        assert torch.equal(found[name].metric.vectors, metric.vectors)
        assert found[name].metric.level == metric.level


def test_without_rows_that_choose_there_is_no_such_part(checkpoints, text, tmp_path):
    plan, rows, model = opened(checkpoints, text, choosing=False)
    store = MomentStore(tmp_path)
    gather_moments(lambda: model, plan.layers, rows, store, unwatched)
    assert {store.read(layer.target.name).choosing for layer in plan.layers} == {None}


@pytest.mark.parametrize("weighted", [False, True])
def test_a_run_that_goes_on_gathers_nothing_twice_and_what_is_missing_to_the_same_bytes(
    checkpoints, text, tmp_path, monkeypatch, weighted
):
    plan, rows, model = opened(checkpoints, text)

    def gather(store):
        gather_moments(lambda: model, plan.layers, rows, store, unwatched, weighted=weighted, seed=3)

    whole = MomentStore(tmp_path / "whole")
    gather(whole)
    with monkeypatch.context() as patch:
        patch.setattr(moments_module, "collect", lambda *_: pytest.fail("gathered twice"))
        gather(whole)
    parts, write = MomentStore(tmp_path / "parts"), MomentStore.write
    written = []

    def interrupted(*arguments):
        written.append(1)
        if len(written) == 2 * len(plan.layers) + 2:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MomentStore, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gather(parts)
    assert [layer.target.name in parts for layer in plan.layers] == [True] + [False] * (len(plan.layers) - 1)
    gather(parts)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_what_is_written_is_read_back(tmp_path):
    torch.manual_seed(0)
    statistics = [ActivationStatistics.of(torch.randn(50, 6)) for _ in PARTS]
    metric = OutputMetric.of(torch.diag(torch.rand(9)))
    store = MomentStore(tmp_path)
    assert "layer" not in store
    for part, own in zip(PARTS[1:], statistics[1:], strict=True):
        store.write("layer", part, own)
    assert "layer" not in store, "what is fitted comes last"
    store.write("layer", "fitted", statistics[0], metric)
    assert "layer" in store
    assert "another" not in store
    found = MomentStore(tmp_path).read("layer")
    for part, own in zip(PARTS, statistics, strict=True):
        read = getattr(found, part)
        assert read.rows == own.rows
        assert torch.equal(read.mean, own.mean)
        assert torch.equal(read.scatter, own.scatter)
    assert torch.equal(found.metric.vectors, metric.vectors)
    assert torch.equal(found.metric.values, metric.values)
    assert found.metric.level == metric.level


def test_space_on_disk_is_known_before(checkpoints, text, tmp_path):
    plan, rows, model = opened(checkpoints, text)
    gather_moments(lambda: model, plan.layers, rows, MomentStore(tmp_path), unwatched)
    sizes = sum(file.stat().st_size for file in tmp_path.iterdir())
    # the headers of the files are not counted
    assert sizes - 400 * len(PARTS) * len(plan.layers) < moment_bytes(plan.layers) <= sizes
