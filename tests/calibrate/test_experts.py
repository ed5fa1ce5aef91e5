"""Moments of experts: padding left out, and those that nothing comes to."""

import pytest
import torch
from torch import nn

from spmconvert.calibrate.statistics import collect
from spmconvert.model.opening import group_of, open_
from tests.commands.test_experts import FAMILIES, built


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_is_left_out(name):
    model = built(FAMILIES[name]).eval()
    open_(model)
    names = [layer for layer, module in model.named_modules() if type(module) is nn.Linear and group_of(layer)]
    rows = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    lengths = (12, 5, 8)
    mask = (torch.arange(12)[None] < torch.tensor(lengths)[:, None]).long()
    sizes = {layer: model.get_submodule(layer).in_features for layer in names}
    padded = collect(model, names, [{"input_ids": rows * mask + (1 - mask), "attention_mask": mask}], experts=sizes)
    alone = [{"input_ids": row[None, :length]} for row, length in zip(rows, lengths, strict=True)]
    exact = collect(model, names, alone, experts=sizes)
    assert any(0 < found.rows < sum(lengths) for found in exact.values())
    for layer, found in padded.items():
        assert found.rows == exact[layer].rows, layer
        torch.testing.assert_close(found.mean, exact[layer].mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.scatter, exact[layer].scatter, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_that_nothing_comes_to_have_others_to_be_like(name):
    model = built(FAMILIES[name]).eval()
    open_(model)
    names = [layer for layer, module in model.named_modules() if type(module) is nn.Linear and group_of(layer)]
    sizes = {layer: model.get_submodule(layer).in_features for layer in names}
    # one token: it comes to a few of them alone
    found = collect(model, names, [{"input_ids": torch.tensor([[5]])}], experts=sizes)
    idle = [layer for layer in names if not found[layer].rows]
    ran = {group_of(layer): found[layer].mean.shape for layer in names if found[layer].rows}
    assert idle
    for layer in idle:
        assert ran[group_of(layer)] == found[layer].mean.shape
