"""The regression of a layer on what converted layers feed it, on data whose best answer is known."""

import pytest
import torch

from spmconvert.sequential import Streams, regress


class FixedStreams(Streams):
    """Pairs that are there already."""

    def __init__(self, pairs):
        self._pairs = pairs

    def pairs(self, index, name):
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
    found = regress(FixedStreams([(z, x @ weight.t())]), 0, "layer", weight)
    bias = (x.mean(0) - z.mean(0)) @ weight.t()
    x, z = drawn(5000, 3)
    errors = [
        (x @ weight.t() - z @ own.t() - mean).square().mean() for own, mean in ((found.weight, found.bias), (weight, bias))
    ]
    assert errors[0] < errors[1]


def test_many_rows_give_least_squares():
    weight = torch.randn(10, 24, generator=torch.Generator().manual_seed(1))
    x, z = drawn(20000, 2)
    parts = [(z[first : first + 700], x[first : first + 700] @ weight.t()) for first in range(0, len(z), 700)]
    found = regress(FixedStreams(parts), 0, "layer", weight)
    ones = torch.cat([z, torch.ones(len(z), 1)], dim=1)
    solved = torch.linalg.lstsq(ones.double(), (x @ weight.t()).double()).solution.float()
    torch.testing.assert_close(found.weight, solved[:-1].t(), rtol=0.05, atol=0.02)
    torch.testing.assert_close(found.bias, solved[-1], rtol=0.05, atol=0.02)
    assert found.inputs.rows == len(z)
