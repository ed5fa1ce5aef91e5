"""Opened recurrences against torch's own."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from spmconvert.model.opening import close_, open_
from spmconvert.model.recurrence import OpenedRecurrence

KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "ReLU": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=5, **options),
}
FORMS = list(itertools.product([1, 3], [False, True], [False, True], [False, True]))


def pair(kind, *, layers=2, **options):
    torch.manual_seed(0)
    holder = nn.ModuleDict({"net": KINDS[kind](7, 9, layers, **options)}).double().eval()
    opened = copy.deepcopy(holder)
    assert open_(opened) == ["net"]
    assert type(opened["net"]) is OpenedRecurrence
    return holder["net"], opened["net"]


def close_to(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "bias", "batch_first", "bidirectional"), FORMS)
def test_the_same_results_and_states(kind, layers, bias, batch_first, bidirectional):
    options = {"layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    dense, opened = pair(kind, **options)
    x = torch.randn(4, 6, 7, dtype=torch.float64)
    wanted = dense(x)
    close_to(opened(x), wanted)
    again = tuple(state * 2 for state in wanted[1]) if isinstance(wanted[1], tuple) else wanted[1] * 2
    close_to(opened(x, again), dense(x, again))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_row(kind):
    dense, opened = pair(kind, bidirectional=True)
    x = torch.randn(5, 7, dtype=torch.float64)
    wanted = dense(x)
    close_to(opened(x), wanted)
    close_to(opened(x, wanted[1]), dense(x, wanted[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ordered", [False, True])
def test_packed_sequences(kind, ordered):
    dense, opened = pair(kind, bidirectional=True)
    lengths = [6, 3, 1] if ordered else [3, 6, 1]
    packed = pack_sequence([torch.randn(n, 7, dtype=torch.float64) for n in lengths], enforce_sorted=ordered)
    found, wanted = opened(packed), dense(packed)
    close_to(pad_packed_sequence(found[0]), pad_packed_sequence(wanted[0]))
    close_to(found[0].data, wanted[0].data)
    close_to(found[1], wanted[1])
    close_to(opened(packed, wanted[1])[1], dense(packed, wanted[1])[1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    dense, opened = pair(kind)
    x = torch.randn(4, 2, 7, dtype=torch.float64, requires_grad=True)
    wanted, found = (torch.autograd.grad(net(x)[0].square().sum(), x)[0] for net in (dense, opened))
    close_to(found, wanted)


def test_closed_again_it_is_what_it_was():
    holder = nn.ModuleDict({"net": nn.LSTM(7, 9, 2, bidirectional=True, proj_size=5)}).double()
    before = {name: value.clone() for name, value in holder.state_dict().items()}
    x = torch.randn(4, 2, 7, dtype=torch.float64)
    wanted = holder["net"](x)
    open_(holder)
    assert set(holder.state_dict()) != set(before)
    close_(holder)
    assert type(holder["net"]) is nn.LSTM
    torch.testing.assert_close(dict(holder.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(holder["net"](x), wanted, rtol=0, atol=0)


def test_dropout_between_layers_only_in_training():
    torch.manual_seed(0)
    holder = nn.ModuleDict({"net": nn.GRU(7, 9, 2, dropout=0.5)})
    open_(holder)
    x = torch.randn(4, 2, 7)
    torch.testing.assert_close(holder.eval()["net"](x), holder["net"](x), rtol=0, atol=0)
    assert not holder.train()["net"](x)[0].equal(holder["net"](x)[0])
