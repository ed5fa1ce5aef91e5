"""Moments of layer inputs: the same however the rows are split, padding left out, refusals."""

import pytest
import torch
from torch import nn

from spmconvert.calibrate.statistics import ActivationStatistics, collect
from spmconvert.errors import CalibrationError
from spmconvert.plan.plan import statistics_bytes


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("sizes", [[300], [1, 299], [100, 100, 100], [0, 300], [7] * 42 + [6]], ids=str)
def test_merging_equals_all_rows_at_once(sizes, offset):
    torch.manual_seed(0)
    x = torch.randn(300, 5) @ torch.randn(5, 5) + offset
    merged = ActivationStatistics.empty(5)
    for part in x.split(sizes):
        merged.merge_(ActivationStatistics.of(part))
    exact = x.double()
    centred = exact - exact.mean(0)
    assert merged.rows == 300
    torch.testing.assert_close(merged.mean.double(), exact.mean(0), rtol=1e-6, atol=1e-6)
    # a mean of 1000 costs the digits it takes to write 1000 in single precision, and no more
    tolerance = 1e-5 if offset == 0 else 1e-3
    torch.testing.assert_close(merged.covariance.double(), centred.t() @ centred / 300, rtol=tolerance, atol=tolerance)


def test_half_precision_rows_are_accumulated_in_single():
    x = (torch.randn(5000, 3) * 30).half()
    found = ActivationStatistics.of(x)
    torch.testing.assert_close(found.covariance.double(), torch.cov(x.double().t(), correction=0), rtol=1e-4, atol=1e-2)


def test_statistics_bytes():
    found = ActivationStatistics.empty(7)
    assert statistics_bytes(7) == sum(t.numel() * t.element_size() for t in (found.mean, found.scatter))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(2, 2)

    def forward(self, x, attention_mask=None):
        return self.second(self.first(x).relu())


def test_collect_sees_what_goes_into_each_layer_without_padding():
    torch.manual_seed(0)
    model, x = Toy(), torch.randn(5, 7, 4)
    mask = torch.arange(7)[None] < torch.tensor([7, 3, 1, 5, 2])[:, None]
    model.train()
    found = collect(
        model, ["first", "second"], [{"x": x[:2], "attention_mask": mask[:2]}, {"x": x[2:], "attention_mask": mask[2:]}]
    )
    assert model.training
    assert not model.first._forward_pre_hooks
    rows = x[mask]
    for name, inputs in (("first", rows), ("second", model.first(rows).relu())):
        assert found[name].rows == len(rows) == 18
        torch.testing.assert_close(
            found[name].covariance, torch.cov(inputs.detach().t(), correction=0), rtol=1e-4, atol=1e-5
        )


def test_layer_that_never_runs():
    with pytest.raises(CalibrationError, match=r"unused never ran.*--ignore"):
        collect(Toy(), ["unused"], [{"x": torch.randn(2, 4)}])


def test_inputs_that_are_not_finite():
    model = Toy()
    with torch.no_grad():
        model.first.bias[0] = float("inf")
    with pytest.raises(CalibrationError, match="not finite"):
        collect(model, ["second"], [{"x": torch.randn(2, 4)}])
