"""SPM stages as a term: what a budget is offered, where a fit starts, and ways to write into an output."""

import pytest
import torch

from spmconvert.errors import OptionError
from spmconvert.operator.chunks import CHUNK_TOKENS
from spmconvert.operator.factors import covariance_root
from spmconvert.operator.geometry import Geometry
from spmconvert.operator.terms.module import LeastSquares
from spmconvert.operator.terms.spm import Stages
from tests.operator.dense import operator_matrix

DESIGNS = [{}, {"variant": "rotation"}, {"block": 2}, {"stages": 0}, {"stages": 1}]
ids = lambda design: "-".join(f"{k}{v}" for k, v in design.items()) or "default"  # noqa: E731


def built(shape=(96, 130), dtype=torch.double, backend="auto", **design):
    """A term of which every parameter does something."""
    torch.manual_seed(0)
    module = Stages.from_options(*shape, design).build(dtype=dtype, backend=backend).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("design", DESIGNS, ids=ids)
@pytest.mark.parametrize("backend", ["reference", "merged", "auto"])
@pytest.mark.parametrize("shape", [(1, 3), (12, 12), (96, 130), (130, 96)], ids=str)
def test_every_way_is_the_dense_matrix(shape, backend, design):
    module = built(shape, backend=backend, **design)
    parameters = [parameter.detach() for parameter in module.parameters()]
    matrix = operator_matrix(*parameters, module.geometry)
    torch.testing.assert_close(module.matrix(), matrix)
    x, bias = torch.randn(6, 2 * shape[0], dtype=torch.double)[:, ::2], torch.randn(shape[1], dtype=torch.double)
    expected = x @ matrix.t()
    torch.testing.assert_close(module.reference(x), expected)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(module(x), expected)
            torch.testing.assert_close(module.biased(x, bias), expected + bias)
    with torch.no_grad():
        y = torch.full_like(expected, torch.nan)
        for given in (None, bias):
            module.write_(x, given, y)
            torch.testing.assert_close(y, expected if given is None else expected + bias)
        module.add_(x, y)
        torch.testing.assert_close(y, 2 * expected + bias)


@pytest.mark.parametrize("shape", [(128, 512), (512, 128), (70, 130), (64, 64)], ids=str)
def test_a_chunk_is_written_into_a_part_of_a_larger_output(shape):
    module, bias = built(shape), torch.randn(shape[1], dtype=torch.double)
    x = torch.randn(2 * CHUNK_TOKENS + 3, shape[0], dtype=torch.double)
    y = torch.full((len(x), shape[1]), torch.nan, dtype=torch.double)
    with torch.no_grad():
        for rows, target in zip(x.split(CHUNK_TOKENS), y.split(CHUNK_TOKENS), strict=True):
            module.write_(rows, bias, target)
        torch.testing.assert_close(y, module.reference(x) + bias)


@pytest.mark.parametrize("design", DESIGNS, ids=ids)
def test_the_matrix_is_proportional_to_the_scale_parameter(design):
    module = built(**design)
    before = module.matrix().detach()
    with torch.no_grad():
        module.scale_parameter().mul_(-3)
    torch.testing.assert_close(module.matrix().detach(), -3 * before)


@pytest.mark.parametrize("shape", [(8, 8), (64, 64), (256, 384), (384, 256), (768, 3072)], ids=str)
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.6])
def test_designs_of_a_budget_fit_it_and_are_distinct(shape, share):
    parameters = int(share * shape[0] * shape[1])
    designs = Stages.designs(*shape, parameters)
    assert all(design.parameter_count() <= parameters for design in designs)
    assert len(set(designs)) == len(designs)
    one_pass = Stages.of(Geometry.create(*shape))
    assert (one_pass in designs) == (one_pass.parameter_count() <= parameters)
    wide = [design for design in designs if design.block > 1]
    assert len(wide) <= 1
    for design in wide:
        larger = Geometry.create(*shape, 1, "general", 2 * design.block)
        assert larger.parameter_count() > parameters or 4 * design.block > min(shape)


def test_the_start_is_the_factorisation_where_that_is_exact_and_random_otherwise():
    torch.manual_seed(0)
    planted, root = built((32, 32), torch.float32).matrix().detach(), covariance_root(torch.cov(torch.randn(32, 100)))
    module = Stages.from_options(32, 32, {}).build()
    module.start_(LeastSquares(planted, root), seed=1)
    torch.testing.assert_close(module.matrix(), planted, rtol=1e-3, atol=1e-4)
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + len(starts))
        module.start_(LeastSquares(torch.randn(32, 32, generator=torch.Generator().manual_seed(5)), root), seed=seed)
        starts.append(module.weight.detach().clone())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize(
    "options", [{"stages": -1}, {"block": 0}, {"variant": "skew"}, {"rank": 2}, {"block": 2, "variant": "rotation"}]
)
def test_what_is_refused(options):
    with pytest.raises(OptionError):
        Stages.from_options(96, 130, options)
