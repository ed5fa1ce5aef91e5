"""Gram matrices by halves."""

import pytest
import torch

from spmconvert.operator.factors import NARROW, gram


@pytest.mark.parametrize("features", [1, 7, NARROW, NARROW + 1, 2 * NARROW + 3, 1000])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_gram_matrix_is_the_product(features: int, rows: int) -> None:
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).t().contiguous().t()
    product = gram(x)
    exact = x.double().t() @ x.double()
    own = (x.t() @ x - exact).abs().max()
    assert (product - exact).abs().max() <= 2 * own + 1e-6
