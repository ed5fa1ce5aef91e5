"""The dense layers' share of the student's outputs: all of it at first, none once the guided steps are over."""

import pytest
import torch
from torch import nn

from spmconvert.distill.guide import Guide


def two_layers(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (2, 0.75), (3, 0.5), (6, 0.0), (7, 0.0)])
def test_outputs_of_the_named_layers_are_mixed_by_the_cosine(step, share):
    student, teacher = two_layers(0), two_layers(1)
    guide = Guide(student, teacher, ["0"], steps=6)
    guide.set_step(step)
    x = torch.randn(5, 6)
    plain = two_layers(0)
    mixed = share * teacher[0](x) + (1 - share) * plain[0](x)
    torch.testing.assert_close(student(x), plain[1:](mixed))


def test_the_dense_layer_gets_what_the_student_feeds_it():
    student, teacher = two_layers(0), two_layers(1)
    Guide(student, teacher, ["2"], steps=6).set_step(0)
    x = torch.randn(5, 6)
    torch.testing.assert_close(student(x), teacher[2](two_layers(0)[:2](x)))


def test_until_a_step_is_set_the_student_is_alone():
    student = two_layers(0)
    Guide(student, two_layers(1), ["0", "2"], steps=6)
    x = torch.randn(5, 6)
    assert torch.equal(student(x), two_layers(0)(x))
