"""A batch of fits is the single fits: as close to them as they are to themselves when a weight is rounded otherwise."""

from dataclasses import replace

import pytest
import torch

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.errors import BackendError, FitError, OptionError
from spmconvert.fit import batched_solver
from spmconvert.fit.aim import Aim
from spmconvert.fit.batched_problem import orthonormal
from spmconvert.fit.batched_solver import fit_batch_
from spmconvert.fit.batched_terms import StackedTerm
from spmconvert.fit.solver import fit_aim_
from spmconvert.operator.design import Design
from spmconvert.operator.linear import SPMLinear
from tests.fit.test_solver import dense, inputs, planted

MEMBERS = 3
# half a unit in the last place of a weight
ROUNDING = 2.0**-25
DESIGNS = {
    "spm": [{"kind": "spm"}],
    "spm, blocks": [{"kind": "spm", "block": 4, "stages": 3}],
    "spm, rotation": [{"kind": "spm", "variant": "rotation"}],
    "spm + lowrank": [{"kind": "spm"}, {"kind": "lowrank", "rank": 4}],
    "monarch": [{"kind": "monarch", "blocks_in": 4, "blocks_out": 2, "rank": 3}],
    "monarch + lowrank": [{"kind": "monarch", "blocks_in": 4, "blocks_out": 2, "rank": 2}, {"kind": "lowrank", "rank": 4}],
    "spm + monarch": [{"kind": "spm", "stages": 2}, {"kind": "monarch", "blocks_in": 4, "blocks_out": 2, "rank": 2}],
    "wrapped": [{"kind": "sparse24", "wrap": True, "wrap_block": 4}],
    "spm + sparse24 + lowrank": [{"kind": "spm", "stages": 3}, {"kind": "sparse24"}, {"kind": "lowrank", "rank": 2}],
    "lowrank": [{"kind": "lowrank", "rank": 4}],
    "sparse24": [{"kind": "sparse24"}],
    "blockdense": [{"kind": "blockdense", "blocks_out": 2, "rank": 4}],
}


def built(entries, sizes=(24, 40), **options):
    return SPMLinear(*sizes, terms=Design.from_options(*sizes, entries).terms, **options)


def aims_of(entries, *, weighted=False, rounded=None):
    """Members of a batch, with fresh layers; ``rounded`` is a seed for other last digits of their weights."""
    metric = OutputMetric.of(torch.diag(torch.logspace(0, -2, 40))) if weighted else None
    aims = []
    for seed in range(MEMBERS):
        weight, bias = dense(24, 40, seed)
        if rounded is not None:
            generator = torch.Generator().manual_seed(100 * rounded + seed)
            weight = weight * (1 + ROUNDING * (torch.rand(weight.shape, generator=generator) * 4 - 2))
        aims.append(Aim(built(entries), weight, bias, ActivationStatistics.of(inputs(24, seed=seed)), seed, metric))
    return aims


def alone(aims, iterations):
    return [fit_aim_(aim, iterations=iterations) for aim in aims]


def distances(aims, others):
    """How far matrices are from others, relative to their norm."""
    pairs = [
        (one.layer.to_dense().detach(), other.layer.to_dense().detach()) for one, other in zip(aims, others, strict=True)
    ]
    return torch.stack([(one - other).norm() / other.norm() for one, other in pairs])


def assert_same_fits(make, iterations):
    """Together and alone are no farther apart than alone and alone from weights that were rounded otherwise."""
    together, single = make(), make()
    found, expected = fit_batch_(together, iterations=iterations), alone(single, iterations)
    spread, moved = torch.zeros(len(single)), torch.zeros(len(single))
    for rounded in range(2):
        other = make(rounded=rounded)
        ends = alone(other, iterations)
        spread = spread.maximum(torch.tensor([abs(a.end - b.end) / b.end for a, b in zip(ends, expected, strict=True)]))
        moved = moved.maximum(distances(other, single))
    for one, other in zip(found, expected, strict=True):
        assert one.iterations == other.iterations
        assert one.start == pytest.approx(other.start, rel=1e-6)
        assert one.end == pytest.approx(other.end, rel=max(4 * spread.max().item(), 1e-6))
    assert distances(together, single).max() <= max(4 * moved.max(), 1e-6)
    for one, other in zip(together, single, strict=True):
        torch.testing.assert_close(
            one.layer.held_bias, other.layer.held_bias, rtol=1e-2, atol=max(4 * moved.max().item(), 1e-4)
        )


@pytest.mark.parametrize(
    ("name", "weighted"),
    [*((name, False) for name in DESIGNS), *((name, True) for name in ("spm", "monarch + lowrank", "wrapped"))],
)
def test_a_batch_is_the_single_fits(name, weighted):
    assert_same_fits(lambda **options: aims_of(DESIGNS[name], weighted=weighted, **options), 24)


def test_members_may_have_low_rank_of_several_ranks_and_some_a_metric():
    def make(**options):
        plain, weighted = (aims_of(DESIGNS["spm"], weighted=one, **options) for one in (False, True))
        mixed = [replace(aim, layer=built([{"kind": "spm"}, {"kind": "lowrank", "rank": 2 + 3 * place}]))
                 for place, aim in enumerate([*plain, *weighted])]  # fmt: skip
        return [mixed[place] for place in (0, 3, 1, 4, 2, 5)]

    assert_same_fits(make, 24)


def test_members_may_have_monarch_of_several_ranks():
    def make(**options):
        terms = [
            [{**DESIGNS["monarch"][0], "rank": 4 - place}, {"kind": "lowrank", "rank": 1 + place}]
            for place in range(MEMBERS)
        ]
        return [
            replace(aim, layer=built(own)) for aim, own in zip(aims_of(DESIGNS["monarch"], **options), terms, strict=True)
        ]

    assert_same_fits(make, 24)


def test_padding_takes_no_part_and_stays_zero():
    modules = [built([{**DESIGNS["monarch"][0], "rank": rank}]).monarch for rank in (2, 5)]
    stacked = StackedTerm.of(modules)
    values = stacked.start().requires_grad_()
    rows = inputs(24)[:50]
    outputs = stacked.outputs(values, rows.expand(2, -1, -1))
    for output, module in zip(outputs, modules, strict=True):
        torch.testing.assert_close(output, module.reference(rows), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), values)
    assert not gradient[0][values[0] == 0].any()
    assert (values[0] == 0).sum() == 3 * modules[0].term.parameter_count() // 2
    for member, module in enumerate(modules):
        own = stacked.own(member, values[member].detach())
        assert all(map(torch.equal, own, (module.first, module.second)))


def test_zero_weights_and_exact_starts_are_left_out_and_keep_their_places():
    weight = planted(24)
    statistics = ActivationStatistics.of(inputs(24))

    def make(**options):
        aims = [
            replace(aim, layer=SPMLinear(24, 24), weight=aim.weight[:24], bias=None)
            for aim in aims_of(DESIGNS["spm"], **options)
        ]
        aims.insert(1, Aim(SPMLinear(24, 24), torch.zeros(24, 24), torch.ones(24), statistics))
        aims.insert(2, Aim(SPMLinear(24, 24), weight, None, statistics))
        return aims

    aims = make()
    results = fit_batch_(aims, iterations=24)
    expected = alone(make(), 24)
    assert [result.iterations for result in results] == [result.iterations for result in expected] == [24, 0, 0, 24, 24]
    assert not aims[1].layer.to_dense().any()
    assert results[2].start == results[2].end < 1e-10
    for one, other in zip(results, expected, strict=True):
        assert one.end == pytest.approx(other.end, rel=1e-4)


def test_a_member_that_no_longer_gains_stops_and_the_others_go_on():
    """With white inputs the start is the best there is."""
    batches = [aims_of(DESIGNS["monarch"]) for _ in range(2)]
    for aims in batches:
        aims[0] = replace(aims[0], statistics=ActivationStatistics.isotropic(24))
    results = fit_batch_(batches[0], iterations=160)
    assert [result.iterations for result in results] == [10, 40, 40]
    for one, other in zip(results, alone(batches[1], 160), strict=True):
        assert one.iterations == other.iterations
        assert one.end == pytest.approx(other.end, rel=1e-3)


def test_steps_that_diverge_leave_the_best_points(monkeypatch):
    monkeypatch.setattr(batched_solver, "STEP_SIZE", 30.0)
    monkeypatch.setattr("spmconvert.fit.solver.STEP_SIZE", 30.0)
    monkeypatch.setattr("spmconvert.fit.solver.POLISH_SHARE", 0.0)
    aims, single = aims_of(DESIGNS["spm + lowrank"]), aims_of(DESIGNS["spm + lowrank"])
    for one, other in zip(fit_batch_(aims, iterations=12), alone(single, 12), strict=True):
        assert one.end <= one.start
        assert one.end == pytest.approx(other.end, rel=1e-4)


def test_no_iterations_are_the_starts():
    aims, single = aims_of(DESIGNS["spm + lowrank"]), aims_of(DESIGNS["spm + lowrank"])
    fit_batch_(aims, iterations=0)
    alone(single, 0)
    assert distances(aims, single).max() == 0


def test_a_layer_alone_in_a_batch_is_fitted_as_ever():
    aims, single = aims_of(DESIGNS["spm"])[:1], aims_of(DESIGNS["spm"])[:1]
    fit_batch_(aims, iterations=24)
    alone(single, 24)
    assert distances(aims, single).max() == 0


def test_what_cannot_be_fitted_is_refused():
    aims = aims_of(DESIGNS["spm"])
    aims[1].weight[0, 0] = torch.nan
    with pytest.raises(FitError, match="not finite"):
        fit_batch_(aims)
    aims = aims_of(DESIGNS["spm"])
    with pytest.raises(OptionError, match="made in float32"):
        fit_batch_([aims[0], replace(aims[1], layer=built(DESIGNS["spm"]).bfloat16())])
    layers = [built(DESIGNS["spm"], backend="merged") for _ in aims]
    for layer in layers:
        # a start and its errors are made by any backend
        layer.spm.backend = "triton"
    with pytest.raises(BackendError, match="merged form"):
        StackedTerm.of([layer.spm for layer in layers])


def test_orthonormal_columns_span_what_they_are_made_of():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(4, 30, 6, generator=generator) * torch.logspace(0, -5, 6)
    # nearly the same column twice, columns of nothing, and a member with fewer of its own
    columns[1, :, 3] = columns[1, :, 0] * 2
    columns[2, :, 4:] = 0
    is_own = torch.ones(4, 6, dtype=torch.bool)
    is_own[3, 4:] = False
    columns[3, :, 4:] = 0
    found = orthonormal(columns, is_own)
    for member, own in enumerate(is_own):
        basis = found[member, :, own]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(int(own.sum())), rtol=0, atol=2e-6)
        left_over = columns[member] - basis @ (basis.mT @ columns[member])
        assert (left_over.norm(dim=0) <= 2e-6 * columns[member].norm(dim=0).clamp_min(1e-20)).all()
    assert not found[3, :, 4:].any()


def test_a_column_that_is_no_number_stays_with_its_member():
    columns = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(1))
    columns[1, 0, 0] = torch.nan
    found = orthonormal(columns, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(found[0].mT @ found[0], torch.eye(3), rtol=0, atol=2e-6)
