"""L-BFGS of many members takes the steps that torch's takes for each of them alone."""

import pytest
import torch

from spmconvert.calibrate.metric import OutputMetric
from spmconvert.fit.batched_lbfgs import BatchedLBFGS
from spmconvert.fit.batched_problem import BatchedProblem
from spmconvert.fit.line_search import MOST_TRIES, Point, _trial, cubic_minimum, strong_wolfe
from spmconvert.fit.problem import Problem
from spmconvert.operator.design import Design
from spmconvert.operator.factors import covariance_root
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.terms.module import LeastSquares
from tests.fit.test_solver import dense, inputs

UNKNOWNS = 12


def torchs(parameters, iterations):
    """torch's own, as a single fit uses it."""
    return torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )


def by_torch(loss, start, bursts, iterations):
    """Points after every burst, and all points at which the loss was asked for."""
    values, asked, ends = start.clone().requires_grad_(), [], []
    optimizer = torchs([values], iterations)

    def closure():
        optimizer.zero_grad()
        asked.append(values.detach().clone())
        found = loss(values)
        found.backward()
        return found.item()

    for _ in range(bursts):
        optimizer.step(closure)
        ends.append(values.detach().clone())
    return ends, asked


def together(losses, starts, bursts, iterations):
    """The same of all members at once."""
    asked, ends = [], []

    def evaluate(values):
        asked.append(values.clone())
        values = values.clone().requires_grad_()
        found = losses(values)
        (gradient,) = torch.autograd.grad(found.sum(), values)
        return found.detach().double(), gradient

    optimizer = BatchedLBFGS(evaluate, starts)
    for _ in range(bursts):
        optimizer.burst(torch.ones(len(starts), dtype=torch.bool), iterations)
        ends.append(optimizer.values.clone())
    return ends, asked


def quadratics(members):
    generator = torch.Generator().manual_seed(3)
    scales = torch.logspace(0, 3, UNKNOWNS, dtype=torch.float64)
    turns = torch.linalg.qr(torch.randn(members, UNKNOWNS, UNKNOWNS, generator=generator, dtype=torch.float64))[0]
    centres = torch.randn(members, UNKNOWNS, generator=generator, dtype=torch.float64)

    def of(member):
        return lambda x: (((x - centres[member]) @ turns[member]).square() * scales).sum(-1)

    return of, torch.zeros(members, UNKNOWNS, dtype=torch.float64)


def valleys(members):
    """Curved valleys (Rosenbrock's), in which searches bracket, zoom, and fail."""
    starts = torch.randn(members, UNKNOWNS, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 3

    def of(member):
        steep = 10.0 ** (member + 1)
        return lambda x: (steep * (x[..., 1:] - x[..., :-1].square()).square() + (1 - x[..., :-1]).square()).sum(-1)

    return of, starts


@pytest.mark.parametrize("iterations", [3, 10])
@pytest.mark.parametrize("family", [quadratics, valleys])
def test_every_member_goes_the_way_that_torch_takes_it_alone(family, iterations):
    members, bursts = 5, 3
    of, starts = family(members)

    def losses(values):
        return torch.stack([of(member)(row) for member, row in enumerate(values)])

    ends, _ = together(losses, starts, bursts, iterations)
    for member in range(members):
        alone, _ = by_torch(of(member), starts[member], bursts, iterations)
        for found, expected in zip(ends, alone, strict=True):
            torch.testing.assert_close(found[member], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", [quadratics, valleys])
def test_one_member_asks_where_torch_asks(family):
    """Only the end of a search that went back is asked for once more."""
    of, starts = family(1)
    _, asked = together(lambda values: of(0)(values), starts, 3, 10)
    _, expected = by_torch(of(0), starts[0], 3, 10)
    again = 0
    for point in expected:
        while not torch.allclose(asked[again][0], point, rtol=1e-6, atol=1e-6):
            assert any(torch.equal(asked[again], earlier) for earlier in asked[:again])
            again += 1
        again += 1
    assert again == len(asked)
    assert len(asked) <= len(expected) + 5


def test_members_at_their_minimum_and_members_that_are_not_live_stay():
    of, starts = quadratics(3)
    starts[1] = by_torch(of(1), starts[1], 12, 20)[0][-1]

    def evaluate(values):
        values = values.clone().requires_grad_()
        found = torch.stack([of(member)(row) for member, row in enumerate(values)]) * torch.tensor([1.0, 0.0, 1.0])
        (gradient,) = torch.autograd.grad(found.sum(), values)
        return found.detach(), gradient

    optimizer = BatchedLBFGS(evaluate, starts)
    optimizer.burst(torch.tensor([True, True, False]), 10)
    assert torch.equal(optimizer.values[1:], starts[1:])
    torch.testing.assert_close(optimizer.values[0], by_torch(of(0), starts[0], 1, 10)[0][-1], rtol=1e-6, atol=1e-6)


def test_a_member_that_is_no_number_leaves_the_others_alone():
    of, starts = quadratics(2)

    def losses(values):
        return torch.stack([of(0)(values[0]), of(1)(values[1]) * torch.nan])

    ends, asked = together(losses, starts, 1, 10)
    torch.testing.assert_close(ends[0][0], by_torch(of(0), starts[0], 1, 10)[0][0], rtol=1e-6, atol=1e-6)
    assert torch.equal(ends[0][1], starts[1])
    assert len(asked) < 2 * MOST_TRIES


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


DESIGNS = {
    "stages": [{"kind": "spm"}],
    "stages and low rank": [{"kind": "spm"}, {"kind": "lowrank", "rank": 3}],
    "monarch": [{"kind": "monarch", "blocks_in": 4, "blocks_out": 2, "rank": 3}],
    "wrapped": [{"kind": "sparse24", "wrap": True, "wrap_block": 4}],
}


def real_problem(entries, seed=0, *, weighted=False):
    """The problem of a layer at its start, in float64."""
    layer = SPMLinear(24, 40, False, terms=Design.from_options(24, 40, entries).terms)
    metric = OutputMetric.of(torch.diag(torch.logspace(0, -2, 40))) if weighted else None
    wanted = LeastSquares(dense(24, 40, seed)[0], covariance_root(torch.cov(inputs(24, seed=seed).t())), metric)
    problem = Problem([module for module in layer.term_modules if module is not layer.low_rank], layer.low_rank, wanted)
    problem.start_(seed)
    for module in problem.free:
        module.double()
    problem.rows, problem.target, problem.zero = (x.double() for x in (problem.rows, problem.target, problem.zero))
    if metric is not None:
        double = OutputMetric(metric.vectors.double(), metric.values.double(), metric.level)
        problem.wanted = LeastSquares(wanted.weight.double(), wanted.root.double(), double)
        problem.zero = double.root(problem.target).square().sum()
    if problem.basis is not None:
        problem.basis = torch.linalg.qr(problem.basis.double())[0]
    return problem


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", DESIGNS)
def test_a_batch_has_the_losses_and_gradients_of_its_members(name, weighted):
    batch = BatchedProblem([real_problem(DESIGNS[name], seed, weighted=weighted) for seed in range(3)])
    values = (batch.start * 1.1).requires_grad_()
    for follow in (True, False):
        losses = batch.losses(values, follow=follow)
        (gradients,) = torch.autograd.grad(losses.sum(), values)
        for seed in range(3):
            alone = real_problem(DESIGNS[name], seed, weighted=weighted)
            with torch.no_grad():
                for parameter in alone.parameters:
                    parameter.mul_(1.1)
            loss = alone.loss(follow=True)
            loss.backward()
            torch.testing.assert_close(losses[seed], loss, rtol=1e-9, atol=0)
            torch.testing.assert_close(gradients[seed], flat([p.grad for p in alone.parameters]), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_real_problem_is_solved_as_torch_solves_it(name):
    alone = real_problem(DESIGNS[name])
    batch = BatchedProblem([real_problem(DESIGNS[name])])
    ends, _ = together(lambda values: batch.losses(values) * 1e6, batch.start, 2, 10)
    optimizer = torchs(alone.parameters, 10)

    def closure():
        optimizer.zero_grad()
        loss = alone.loss() * 1e6
        loss.backward()
        return loss.item()

    for end in ends:
        optimizer.step(closure)
        torch.testing.assert_close(end[0], flat(alone.parameters), rtol=1e-5, atol=1e-7)


def searched(loss, step, reach=1.0):
    """Steps that a search along a line asks for."""
    point = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def at(where):
        moved = (point + where).requires_grad_()
        value = loss(moved)
        return value.item(), torch.autograd.grad(value, moved)[0].item()

    search, asked = strong_wolfe(Point(0.0, *at(0.0)), step, reach), []
    asked.append(next(search))
    while True:
        try:
            asked.append(search.send(at(asked[-1])))
        except StopIteration as ended:
            return asked, ended.value


def test_a_search_ends_at_what_it_asked_for_last():
    # falls for ever: the step is lengthened until there are no more tries
    asked, evaluations = searched(lambda t: -t - t**2, 1.0)
    assert evaluations == MOST_TRIES + 1 == len(asked)
    assert asked[-1] == max(asked)
    # rises wherever it is looked at: back to the start
    asked, evaluations = searched(lambda t: 1e3 * t.abs() - 1e-9 * t, 1.0, reach=1.0)
    assert (asked[-1], evaluations) == (0.0, len(asked) - 1)


def test_a_bracket_of_one_point_has_a_middle():
    assert cubic_minimum(Point(1.0, 0.0, -1.0), Point(1.0, 0.0, 1.0), 0.0, 3.0) == 1.5
    assert cubic_minimum(Point(0.0, 0.0, -1.0), Point(2.0, 0.0, 1.0), 0.0, 2.0) == 1.0
    assert cubic_minimum(Point(2.0, 0.0, 1.0), Point(0.0, 0.0, -1.0), 0.0, 2.0) == 1.0


def test_a_trial_is_not_near_an_end_of_the_bracket_twice():
    # least at 0.25, which is no end; then at 0.05, which is near one and is moved to a tenth of the bracket the next time
    middle, near = (
        [Point(0.0, least**2, -2 * least), Point(1.0, (1 - least) ** 2, 2 - 2 * least)] for least in (0.25, 0.05)
    )
    assert _trial(middle, True) == (pytest.approx(0.25), False)
    assert _trial(near, False) == (pytest.approx(0.05), True)
    assert _trial(near, True) == (pytest.approx(0.1), False)
    # beyond the bracket, at once
    assert _trial([Point(0.0, 0.0, 1.0), Point(1.0, 1.5, 2.0)], False) == (pytest.approx(0.1), False)


def test_a_member_that_waits_for_the_end_of_a_burst_goes_on_from_its_own_last_move():
    """The first one is out of evaluations while the second one still has iterations."""
    steep, start = valleys(1)
    centre = torch.linspace(1, 2, UNKNOWNS, dtype=torch.float64)
    easy = lambda x: ((x - centre).square() * (1 + centre)).sum(-1) + (x - centre).pow(4).sum(-1)  # noqa: E731
    starts = torch.cat([start, torch.zeros_like(start)])
    ends, _ = together(lambda values: torch.stack([steep(0)(values[0]), easy(values[1])]), starts, 3, 10)
    for member, loss in enumerate((steep(0), easy)):
        for found, expected in zip(ends, by_torch(loss, starts[member], 3, 10)[0], strict=True):
            torch.testing.assert_close(found[member], expected, rtol=1e-6, atol=1e-6)


def test_every_member_gets_its_own_columns_back():
    problems = [real_problem([DESIGNS["stages"][0], {"kind": "lowrank", "rank": rank}]) for rank in (2, 5)]
    bases = [problem.basis for problem in problems]
    batch = BatchedProblem(problems)
    for member, (problem, basis) in enumerate(zip(problems, bases, strict=True)):
        values, found = batch.point(member, batch.start, batch.basis)
        assert torch.equal(found, basis)
        assert all(map(torch.equal, values, problem.parameters))
