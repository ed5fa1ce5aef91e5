"""The regression of a layer on what converted layers feed it, on data whose best answer is known."""

import pytest
import torch

from spmconvert.fit.sequential import regress
from spmconvert.fit.streams import Streams


class FixedStreams(Streams):
    """Pairs that are there already."""

    def __init__(self, pairs):
        self._pairs = pairs

    def pairs(self, name):
        return iter(self._pairs)


def drawn(rows, seed):
    """Inputs x of a dense layer, and what a converted model makes of them: a part is lost, noise comes in."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 24, generator=generator) * torch.linspace(0.2, 3.0, 24) + 1.0
    return x, 0.8 * x + 0.5 * torch.randn(rows, 24, generator=generator)


@pytest.mark.parametrize("rows", [8, 30, 60, 4000])
def test_a_regression_is_never_worse_on_other_rows_than_the_weight(rows):
    weight = torch.randn(10, 24, generator=torch.Generator().manual_seed(1))
    x, z = drawn(rows, 2)
    found = regress(FixedStreams([(z, x @ weight.t())]), "layer", weight, bias=True)
    bias = (x.mean(0) - z.mean(0)) @ weight.t()
    x, z = drawn(5000, 3)
    errors = [
        (x @ weight.t() - z @ own.t() - mean).square().mean() for own, mean in ((found.weight, found.bias), (weight, bias))
    ]
    assert errors[0] < errors[1]


def test_batches_add_up_to_ridge_regression():
    weight = torch.randn(10, 24, generator=torch.Generator().manual_seed(1))
    x, z = drawn(2000, 2)
    # in an order in which every batch has other means
    order = z[:, -1].argsort()
    x, z = x[order], z[order]
    parts = [(z[first : first + 300], x[first : first + 300] @ weight.t()) for first in range(0, len(z), 300)]
    found = regress(FixedStreams(parts), "layer", weight, bias=True)
    inputs, outputs = z.double(), (x @ weight.t()).double()
    centred = inputs - inputs.mean(0)
    covariance = centred.t() @ centred / len(z)
    ridge = 24 / 2000 * covariance.diagonal().mean()
    cross = (outputs - outputs.mean(0)).t() @ centred / len(z) + ridge * weight.double()
    expected = torch.linalg.solve(covariance + ridge * torch.eye(24).double(), cross.t()).t()
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias.double(), outputs.mean(0) - expected @ inputs.mean(0), rtol=1e-4, atol=1e-4)
    assert found.inputs.rows == len(z)


def test_a_regression_without_a_bias_is_of_what_is_not_centred():
    weight = torch.randn(10, 24, generator=torch.Generator().manual_seed(1))
    x, z = drawn(2000, 2)
    parts = [(z[first : first + 300], x[first : first + 300] @ weight.t()) for first in range(0, len(z), 300)]
    found = regress(FixedStreams(parts), "layer", weight, bias=False)
    inputs, outputs = z.double(), (x @ weight.t()).double()
    moment = inputs.t() @ inputs / len(z)
    ridge = 24 / 2000 * moment.diagonal().mean()
    expected = torch.linalg.solve(
        moment + ridge * torch.eye(24).double(), (outputs.t() @ inputs / len(z) + ridge * weight.double()).t()
    ).t()
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-4, atol=1e-5)
    assert found.bias is None
    assert not found.inputs.mean.any()
    torch.testing.assert_close(found.inputs.covariance.double(), moment, rtol=1e-4, atol=1e-5)
