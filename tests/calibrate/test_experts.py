"""Moments of experts: padding left out, and those that nothing comes to."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spmconvert.calibrate.pooling import pool_experts
from spmconvert.calibrate.statistics import ActivationStatistics, collect
from spmconvert.calibrate.store import MomentStore
from spmconvert.errors import CalibrationError
from spmconvert.model.opening import group_of, open_
from spmconvert.plan.targets import Target
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


def pooled(folder, rows):
    """What two experts see together that saw so many tokens, by part."""
    store, layers = MomentStore(folder), []
    for index in (0, 1):
        name = f"h.0.experts.{index}.up"
        target = Target(name, "linear", 3, 4, bias=False, group="h.0.experts.up")
        layers.append(SimpleNamespace(target=target))
        for part, counts in rows.items():
            store.write(name, part, ActivationStatistics.of(torch.randn(counts[index], 3)))
    pool_experts(store, layers)
    return store.own("h.0.experts.up"), store.read("h.0.experts.1.up")


def test_an_expert_without_tokens_has_those_of_the_others(tmp_path):
    together, idle = pooled(tmp_path, {"choosing": (4, 0), "held_out": (3, 0), "fitted": (9, 0)})
    assert idle.tokens == 0
    torch.testing.assert_close(idle.fitted.covariance, together.fitted.covariance)
    assert (idle.held_out.rows, idle.choosing.rows) == (3, 4)


@pytest.mark.parametrize(
    ("part", "words"),
    [("fitted", "no calibration token"), ("held_out", "none of the held out rows"), ("choosing", "none of the choosing")],
)
def test_experts_of_which_none_was_chosen_are_refused(tmp_path, part, words):
    with pytest.raises(CalibrationError, match=rf"{words}.* h\.0\.experts\.up; .*--ignore"):
        pooled(tmp_path, {"choosing": (4, 1), "held_out": (3, 2), "fitted": (9, 5), part: (0, 0)})
