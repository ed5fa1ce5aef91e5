"""The moving average of the trained parameters, and the best ones, on numbers that a pencil gives as well."""

import pytest
import torch
from torch import nn

from spmconvert.distill.state import State


def averages(decay, values):
    """The average after every step, for one parameter that takes these values."""
    state, trained, found = State(), {"w": nn.Parameter(torch.zeros(1))}, []
    for value in values:
        with torch.no_grad():
            trained["w"].fill_(value)
        state.step += 1
        state.update_average(trained, decay)
        found.append(state.average["w"].item() if state.average else None)
    return found


def test_average_forgets_by_its_decay_after_a_short_memory_at_first():
    # weights of the newest value: all, 1/3, 1/4, and then no less than 1 - decay
    assert averages(0.8, [4.0, 1.0, 7.0, 3.0]) == pytest.approx([4.0, 3.0, 4.0, 3.8])


def test_without_a_decay_no_average_is_kept():
    assert averages(0.0, [4.0, 1.0]) == [None, None]


def test_the_average_is_in_the_parameters_place_for_a_while():
    trained = {"w": nn.Parameter(torch.tensor([2.0, 4.0]))}
    state = State(average={"w": torch.tensor([1.0, 9.0])})
    with state.averaged(trained):
        assert trained["w"].tolist() == [1.0, 9.0]
    assert trained["w"].tolist() == [2.0, 4.0]
    assert state.average["w"].tolist() == [1.0, 9.0]


def test_the_best_parameters_are_those_of_the_lowest_loss():
    state, trained = State(), {"w": nn.Parameter(torch.zeros(1))}
    for value, loss in ((1.0, 0.5), (2.0, 0.25), (3.0, 0.4), (4.0, float("nan"))):
        with torch.no_grad():
            trained["w"].fill_(value)
        state.offer(loss, trained)
    assert (state.best["w"].item(), state.best_loss) == (2.0, 0.25)
