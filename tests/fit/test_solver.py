"""Properties of a fit that must hold for every layer, however awkward its inputs are."""

import copy

import pytest
import torch

import spmconvert
from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.errors import FitError, OptionError
from spmconvert.fit.error import measure_error
from spmconvert.fit.solver import fit_, fit_linear
from spmconvert.operator.design import Design
from spmconvert.operator.factors import RIDGE, covariance_root, damped_root, rank_at, truncated_svd
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.start import hierarchical_start_


def inputs(features, rows=400, seed=0):
    """Correlated rows with a mean, like activations."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(features, features, generator=generator) * torch.arange(1, features + 1).pow(-0.7)[:, None]
    return torch.randn(rows, features, generator=generator) @ spread + torch.randn(features, generator=generator)


def dense(fan_in, fan_out, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(fan_out, fan_in, generator=generator), torch.randn(fan_out, generator=generator)


def error_of(layer, weight, bias, statistics):
    return measure_error((weight, bias), (layer.to_dense(), layer.held_bias), statistics).centred


def planted(width, **design):
    torch.manual_seed(width)
    layer = SPMLinear(width, width, bias=False, **design)
    with torch.no_grad():
        layer.spm.scale_in.normal_()
        layer.spm.scale_out.normal_()
    return layer.to_dense().detach()


@pytest.mark.parametrize(("width", "block"), [(8, 1), (64, 1), (5, 1), (24, 1), (96, 1), (24, 2), (48, 4)])
def test_product_of_stages_is_recovered(width, block):
    weight = planted(width, block=block)
    layer = SPMLinear(width, width, block=block)
    hierarchical_start_(layer.spm, weight)
    assert (layer.to_dense() - weight).norm() / weight.norm() < 1e-5
    layer = SPMLinear(width, width, block=block)
    fit_(layer, weight, None, ActivationStatistics.of(inputs(width)), iterations=50)
    assert (layer.to_dense() - weight).norm() / weight.norm() < 1e-4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("iterations", [0, 1, 5, 40])
@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)], ids=str)
def test_never_worse_than_start_or_zero(shape, iterations, seed):
    weight, bias = dense(*shape, seed)
    statistics = ActivationStatistics.of(inputs(shape[0], seed=seed))
    layer = SPMLinear(*shape)
    result = fit_(layer, weight, bias, statistics, iterations=iterations, seed=seed)
    assert result.end <= result.start
    assert result.end <= 1
    assert error_of(layer, weight, bias, statistics) <= 1 + 1e-5
    assert error_of(layer, weight, bias, statistics) == pytest.approx(result.end, rel=1e-2)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("iterations", [0, 5, 60])
def test_companion_is_never_worse_than_its_svd_alone(rank, iterations):
    weight, bias = dense(24, 40)
    statistics = ActivationStatistics.of(inputs(24))
    left, right = truncated_svd(weight, covariance_root(statistics.covariance), rank)
    shift = bias + (weight - left @ right) @ statistics.mean
    alone = measure_error((weight, bias), (left @ right, shift), statistics).centred
    layer = SPMLinear(24, 40, rank=rank)
    fit_(layer, weight, bias, statistics, iterations=iterations)
    assert error_of(layer, weight, bias, statistics) <= alone * (1 + 1e-3)
    if iterations == 60 and rank < 16:
        assert error_of(layer, weight, bias, statistics) < 0.97 * alone, "the stages add nothing"


@pytest.mark.parametrize("iterations", [1, 30])
@pytest.mark.parametrize("weighted", [False, True])
def test_companion_is_the_svd_of_what_the_stages_leave(iterations, weighted):
    weight, bias = dense(24, 40)
    statistics = ActivationStatistics.of(inputs(24))
    metric = OutputMetric.of(torch.diag(torch.logspace(0, -2, 40))) if weighted else None
    layer = SPMLinear(24, 40, rank=5)
    end = fit_(layer, weight, bias, statistics, iterations=iterations, metric=metric).end
    root = covariance_root(statistics.covariance)
    energy = (lambda rows: rows.square().sum()) if metric is None else metric.energy
    found = energy(root @ (weight - layer.to_dense().detach()).t())
    stages = layer.to_dense().detach() - layer.lowrank.matrix().detach()
    left, right = truncated_svd(weight - stages, root, 5, metric)
    best = energy(root @ (weight - stages - left @ right).t())
    assert best * (1 - 1e-5) <= found <= best * (1 + 1e-3)
    assert end == pytest.approx((found / energy(root @ weight.t())).item(), rel=1e-3)


@pytest.mark.parametrize("design", [{}, {"stages": 14}, {"block": 4}, {"variant": "rotation"}, {"stages": 0}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_stages_and_companion_do_not_cancel(design, weighted):
    weight, bias = dense(128, 32)
    # as in trained layers, a few output directions carry most of the energy: those are the companion's
    weight = weight * torch.logspace(0, -1.5, 32)[:, None]
    rows = inputs(128, 600)
    metric = OutputMetric.of(torch.diag(torch.logspace(0, -2, 32))) if weighted else None
    layer = SPMLinear(128, 32, rank=16, **design)
    fit_(layer, weight, bias, ActivationStatistics.of(rows), iterations=200, metric=metric)
    with torch.no_grad():
        whole = layer(rows) - layer.held_bias
        companion = layer.lowrank.biased(rows, None)
        # without the penalty up to 8.6 times the whole
        for part in (whole - companion, companion):
            assert part.var(0).sum() < 1.5**2 * whole.var(0).sum()
        for dtype, allowed in ((torch.bfloat16, 1e-4), (torch.float16, 2e-6)):
            rounded = copy.deepcopy(layer).to(dtype)
            lost = (rounded(rows.to(dtype)).float() - layer(rows)).square().sum() / layer(rows).square().sum()
            assert lost < allowed, dtype


@pytest.mark.parametrize("rank", [0, 3])
def test_a_single_iteration_is_the_best_step_along_the_gradient(rank):
    weight, bias = dense(24, 40)
    # one of L-BFGS: a step of Adam would have the same length whatever it finds there
    result = fit_(SPMLinear(24, 40, rank=rank), weight, bias, ActivationStatistics.of(inputs(24)), iterations=1)
    assert result.end < 0.99 * result.start


@pytest.mark.parametrize(("iterations", "last"), [(1, 1), (4, 1), (30, 3)])
def test_the_last_tenth_of_the_iterations_is_of_lbfgs(monkeypatch, iterations, last):
    steps = []

    class Counted(torch.optim.LBFGS):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            steps.append(options["max_iter"])

    class Stepped(torch.optim.Adam):
        def step(self):
            steps.append("Adam")
            return super().step()

    monkeypatch.setattr(torch.optim, "LBFGS", Counted)
    monkeypatch.setattr(torch.optim, "Adam", Stepped)
    weight, bias = dense(24, 40)
    fit_(SPMLinear(24, 40), weight, bias, ActivationStatistics.of(inputs(24)), iterations=iterations)
    assert steps == ["Adam"] * (iterations - last) + [last]


def test_companion_follows_the_stages():
    torch.manual_seed(1)
    weight = planted(32) + torch.randn(32, 4) @ torch.randn(4, 32)
    layer = SPMLinear(32, 32, rank=4)
    result = fit_(layer, weight, None, ActivationStatistics.of(inputs(32)), iterations=150, seed=1)
    # 0.013 where it follows, 0.1 where it stays at the start's SVD until the end
    assert result.end < 0.04 * result.start


def test_same_seed_same_bytes_and_another_seed_another_start():
    weight, bias = dense(24, 40)
    statistics = ActivationStatistics.of(inputs(24))
    layers = [SPMLinear(24, 40) for _ in range(3)]
    for layer, seed in zip(layers, (1, 1, 2), strict=True):
        torch.manual_seed(seed + 10 * id(layer) % 97)
        fit_(layer, weight, bias, statistics, iterations=20, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True))
    assert not torch.equal(layers[0].spm.weight, layers[2].spm.weight)


def awkward_rows():
    x = inputs(24)
    dead = x.clone()
    dead[:, ::3] = 0
    scales = x * torch.logspace(-8, 4, 24)
    return {
        "dead channels": dead,
        "one row": x[:1],
        "two rows": x[:2],
        "duplicated rows": x[:5].repeat(50, 1),
        "constant": torch.ones(50, 24),
        "all zero": torch.zeros(50, 24),
        "twelve decades": scales,
        "huge": x * 1e12,
        "tiny": x * 1e-12,
    }


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", awkward_rows())
def test_ill_conditioned_inputs_give_finite_layers(kind, rank):
    weight, bias = dense(24, 40)
    statistics = ActivationStatistics.of(awkward_rows()[kind])
    layer = SPMLinear(24, 40, rank=rank)
    result = fit_(layer, weight, bias, statistics, iterations=15)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert result.end <= 1
    found = measure_error((weight, bias), (layer.to_dense(), layer.held_bias), statistics)
    assert found.relative <= 1 + 1e-3


def test_zero_weight():
    layer = SPMLinear(24, 40)
    fit_(layer, torch.zeros(40, 24), torch.ones(40), ActivationStatistics.of(inputs(24)), iterations=5)
    torch.testing.assert_close(layer(inputs(24)), torch.ones(400, 40))


@pytest.mark.parametrize("where", ["weight", "scatter", "mean"])
def test_numbers_that_are_not_finite_are_refused(where):
    weight, bias = dense(8, 8)
    statistics = ActivationStatistics.of(inputs(8))
    {"weight": weight, "scatter": statistics.scatter, "mean": statistics.mean}[where].view(-1)[0] = float("nan")
    with pytest.raises(FitError, match="not finite"):
        fit_(SPMLinear(8, 8), weight, bias, statistics)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_correction_makes_the_mean_output_exact(bias):
    weight, shift = dense(24, 40)
    x = inputs(24)
    layer = SPMLinear(24, 40)
    fit_(layer, weight, shift if bias else None, ActivationStatistics.of(x), iterations=5)
    y = x @ weight.t() + (shift if bias else 0)
    torch.testing.assert_close(layer(x).mean(0), y.mean(0), rtol=1e-4, atol=1e-4)


def test_measured_error_is_the_empirical_one():
    weight, bias = dense(24, 40)
    x = inputs(24)
    layer = SPMLinear(24, 40)
    fit_(layer, weight, bias, ActivationStatistics.of(x[:200]), iterations=10)
    held_out = x[200:]
    y, approximate = held_out @ weight.t() + bias, layer(held_out)
    found = measure_error((weight, bias), (layer.to_dense(), layer.held_bias), ActivationStatistics.of(held_out))
    missed = (y - approximate).square().sum()
    assert found.relative == pytest.approx((missed / y.square().sum()).item(), rel=1e-4)
    assert found.centred == pytest.approx((missed / (y - y.mean(0)).square().sum()).item(), rel=1e-4)


def test_weighting_by_the_inputs_pays_on_held_out_rows():
    weight, bias = dense(48, 48)
    x = inputs(48, rows=2000)
    fitted, held_out = ActivationStatistics.of(x[:1500]), ActivationStatistics.of(x[1500:])
    weighted, plain = SPMLinear(48, 48), SPMLinear(48, 48)
    fit_(weighted, weight, bias, fitted, iterations=100)
    fit_(plain, weight, bias, ActivationStatistics.isotropic(48), iterations=100)
    assert error_of(weighted, weight, bias, held_out) < 0.6 * error_of(plain, weight, bias, held_out)


def test_rotation_fits_too():
    weight, bias = dense(32, 32)
    layer = SPMLinear(32, 32, variant="rotation", stages=15)
    assert fit_(layer, weight, bias, ActivationStatistics.of(inputs(32)), iterations=100).end < 0.6


def test_whitened_svd_is_the_best_of_its_rank():
    weight, _ = dense(24, 40)
    covariance = ActivationStatistics.of(inputs(24)).covariance
    root = covariance_root(covariance)
    torch.testing.assert_close(root.t() @ root, covariance, rtol=1e-3, atol=1e-4)
    values, vectors = torch.linalg.eigh(covariance.double())
    half = (vectors * values.clamp_min(0).sqrt()) @ vectors.t()
    singular = torch.linalg.svdvals(weight.double() @ half)
    for rank in (1, 5, 23):
        left, right = truncated_svd(weight, root, rank)
        missed = (weight - left @ right).double()
        found = (missed @ covariance.double() * missed).sum()
        assert found.item() == pytest.approx(singular[rank:].square().sum().item(), rel=2e-2)
        u, s, v = torch.linalg.svd(weight)
        plain = (weight - (u[:, :rank] * s[:rank]) @ v[:rank]).double()
        assert found < (plain @ covariance.double() * plain).sum()


def test_rank_at_never_has_more_parameters():
    assert rank_at(1919, 384, 1536) == 0
    assert rank_at(1920, 384, 1536) == 1
    assert rank_at(10**9, 384, 1536) == 384


def test_fit_linear_keeps_dtype_and_needs_no_data():
    linear = torch.nn.Linear(24, 24, bias=False, dtype=torch.bfloat16)
    layer, result = fit_linear(linear, iterations=10)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.held_bias is None
    assert 0 < result.end < 1
    assert fit_linear(linear, ActivationStatistics.of(inputs(24)), iterations=2)[0].held_bias is None
    biased = torch.nn.Linear(24, 24)
    assert fit_linear(biased, ActivationStatistics.of(inputs(24)), iterations=2)[0].held_bias is not None


@pytest.mark.parametrize("entry", [{"kind": "lowrank", "rank": 6}, {"kind": "sparse24"}, {"kind": "spm", "stages": 4}])
def test_a_layer_without_a_bias_matches_the_mean_by_its_matrix(entry):
    """Inputs with a large mean: fitted to what varies alone, the mean output would be lost."""
    statistics = ActivationStatistics.of(inputs(24) + 4 * torch.linspace(-1, 1, 24))
    linear = torch.nn.Linear(24, 24, bias=False)
    dense = (linear.weight.detach(), None)
    errors = []
    for moments in (statistics.uncentred(), statistics):
        layer = SPMLinear(24, 24, bias=False, terms=Design.from_options(24, 24, [entry]).terms)
        fit_(layer, dense[0], None, moments, iterations=60)
        errors.append(measure_error(dense, (layer.to_dense(), None), statistics).relative)
    assert errors[0] < 0.7 * errors[1]
    found = fit_linear(linear, statistics, iterations=60, terms=Design.from_options(24, 24, [entry]).terms)[0]
    assert measure_error(dense, (found.to_dense(), None), statistics).relative == pytest.approx(errors[0], rel=1e-4)


def test_solver_that_diverges_leaves_the_best_point(monkeypatch):
    monkeypatch.setattr("spmconvert.fit.solver.STEP_SIZE", 30.0)
    monkeypatch.setattr("spmconvert.fit.solver.POLISH_SHARE", 0.0)
    weight, bias = dense(24, 40)
    statistics = ActivationStatistics.of(inputs(24))
    layer = SPMLinear(24, 40)
    result = fit_(layer, weight, bias, statistics, iterations=12)
    assert result.end <= result.start
    assert error_of(layer, weight, bias, statistics) == pytest.approx(result.end, rel=1e-3)


def test_fit_linear_is_the_public_way_to_fit_one_layer():
    torch.manual_seed(0)
    source = torch.nn.Linear(24, 24)
    layer, result = spmconvert.fit_linear(source, stages=10, iterations=30)
    assert layer.spm.geometry.stages == 10
    error = (layer.to_dense() - source.weight).square().sum() / source.weight.square().sum()
    assert error < 0.9
    assert error.item() == pytest.approx(result.end, rel=1e-4)
    torch.testing.assert_close(layer.held_bias, source.bias)


SUMS = [
    [{"kind": "lowrank", "rank": 5}],
    [{"kind": "sparse24"}],
    [{"kind": "sparse24"}, {"kind": "lowrank", "rank": 5}],
    [{"kind": "spm"}, {"kind": "sparse24"}],
    [{"kind": "spm", "stages": 3}, {"kind": "sparse24"}, {"kind": "lowrank", "rank": 2}],
]
kinds = lambda entries: "+".join(entry["kind"] for entry in entries)  # noqa: E731


def summed(entries, bias=True):
    return SPMLinear(24, 40, bias, terms=Design.from_options(24, 40, entries).terms)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("iterations", [0, 30])
@pytest.mark.parametrize("entries", SUMS, ids=kinds)
def test_sums_of_terms_have_the_error_that_the_fit_reports(entries, iterations, weighted):
    weight, bias = dense(24, 40)
    statistics = ActivationStatistics.of(inputs(24))
    metric = OutputMetric.of(torch.diag(torch.logspace(0, -2, 40))) if weighted else None
    layer = summed(entries)
    result = fit_(layer, weight, bias, statistics, iterations=iterations, metric=metric)
    root = covariance_root(statistics.covariance)
    missed, whole = (root @ matrix.t() for matrix in (weight - layer.to_dense().detach(), weight))
    energy = (lambda rows: rows.square().sum()) if metric is None else metric.energy
    assert result.end == pytest.approx((energy(missed) / energy(whole)).item(), rel=1e-3)
    assert result.end <= result.start <= 1 + 1e-6
    rows = inputs(24)
    torch.testing.assert_close(layer(rows).mean(0), (rows @ weight.t() + bias).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entries", SUMS[2:], ids=kinds)
def test_more_terms_are_better_than_the_closed_form_among_them(entries):
    weight, bias = dense(24, 40)
    statistics = ActivationStatistics.of(inputs(24))
    ends = [fit_(summed(terms), weight, bias, statistics, iterations=60).end for terms in ([{"kind": "sparse24"}], entries)]
    assert ends[1] < 0.97 * ends[0]


@pytest.mark.parametrize("entries", [SUMS[0], SUMS[1]], ids=kinds)
def test_closed_forms_take_no_iterations_and_no_seed(entries):
    weight, bias = dense(24, 40)
    statistics = ActivationStatistics.of(inputs(24))
    layers = [summed(entries) for _ in range(2)]
    for seed, layer in enumerate(layers):
        result = fit_(layer, weight, bias, statistics, iterations=100 * seed, seed=seed)
        assert result.iterations == 0
        assert result.start == result.end
    assert all(map(torch.equal, layers[0].parameters(), layers[1].parameters()))


def test_low_rank_alone_is_the_whitened_svd():
    weight, bias = dense(24, 40)
    statistics = ActivationStatistics.of(inputs(24))
    layer = summed(SUMS[0])
    fit_(layer, weight, bias, statistics)
    left, right = truncated_svd(weight, covariance_root(statistics.covariance), 5)
    torch.testing.assert_close(layer.to_dense(), left @ right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lowrank.up.weight.norm(dim=0), layer.lowrank.down.weight.norm(dim=1))
    torch.testing.assert_close(layer.held_bias, statistics.corrected_bias(weight, left @ right, bias), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("entries", SUMS, ids=kinds)
def test_a_zero_weight_makes_every_term_zero(entries):
    layer = summed(entries)
    result = fit_(layer, torch.zeros(40, 24), torch.ones(40), ActivationStatistics.of(inputs(24)), iterations=5)
    assert (result.start, result.end) == (1.0, 1.0)
    assert not layer.to_dense().any()
    torch.testing.assert_close(layer(inputs(24)), torch.ones(400, 40))


@pytest.mark.parametrize("entries", SUMS, ids=kinds)
def test_nothing_that_was_kept_before_a_fit_is_served_after_it(entries):
    weight, bias = dense(24, 40)
    layer, rows = summed(entries).eval(), inputs(24)
    with torch.no_grad():
        layer(rows)
        fit_(layer, weight, bias, ActivationStatistics.of(rows), iterations=5)
        expected = torch.nn.functional.linear(rows, layer.to_dense(), layer.held_bias)
        torch.testing.assert_close(layer(rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entries", SUMS, ids=kinds)
def test_a_layer_without_a_bias_is_fitted_too(entries):
    weight, _ = dense(24, 40)
    layer = summed(entries, bias=False)
    assert fit_(layer, weight, None, ActivationStatistics.isotropic(24), iterations=5).end < 1
    assert layer.held_bias is None


def test_a_root_that_is_known_is_taken():
    weight, bias = dense(24, 40)
    statistics = ActivationStatistics.of(inputs(24))
    layers = [SPMLinear(24, 40, stages=3, rank=2) for _ in range(2)]
    for layer, root in zip(layers, (None, covariance_root(statistics.covariance)), strict=True):
        fit_(layer, weight, bias, statistics, iterations=5, root=root)
    assert all(map(torch.equal, layers[0].parameters(), layers[1].parameters()))


def test_layers_that_are_not_in_single_precision_are_refused():
    weight, bias = dense(8, 8)
    with pytest.raises(OptionError, match="fits are made in float32"):
        fit_(SPMLinear(8, 8).bfloat16(), weight, bias, ActivationStatistics.of(inputs(8)))


def test_fit_linear_takes_terms():
    torch.manual_seed(0)
    source = torch.nn.Linear(24, 40, dtype=torch.bfloat16)
    terms = Design.from_options(24, 40, SUMS[2]).terms
    layer, result = spmconvert.fit_linear(source, terms=terms)
    assert layer.design.terms == terms
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert 0 < result.end < 1


def test_damping_rises_where_moments_are_singular():
    """Negative eigenvalues beyond the ridge are lifted; a matrix that needs no more gets no more."""
    plain = torch.cov(torch.randn(6, 100, generator=torch.Generator().manual_seed(0)))
    root, ridge = damped_root(plain)
    assert ridge == RIDGE
    torch.testing.assert_close(root.t() @ root, plain, rtol=1e-4, atol=1e-5)
    broken = plain.clone()
    broken.diagonal()[2] = -3e-4 * plain.diagonal().mean()
    broken[2, :2], broken[2, 3:], broken[:2, 2], broken[3:, 2] = 0, 0, 0, 0
    root, ridge = damped_root(broken)
    assert ridge == pytest.approx(1e-3)
    assert root.isfinite().all()
    lifted = broken + torch.eye(6) * ridge * broken.diagonal().mean()
    torch.testing.assert_close(root.t() @ root, lifted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_no_damping_helps_are_refused(value):
    """A ridge that rises until the sum is positive definite would rise forever."""
    broken = torch.eye(6)
    broken[2, 3] = value
    with pytest.raises(FitError, match="not finite"):
        damped_root(broken)
