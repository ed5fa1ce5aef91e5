"""Losses against their definitions, and the chunked form against the plain one."""

import pytest
import torch

from spmconvert.outputs import losses
from spmconvert.outputs.losses import hidden_state_loss, kl_divergence, over_chunks, sparse_kl_divergence


def test_kl_is_the_definition():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = (p * (p / q).log()).sum() * 4
    torch.testing.assert_close(kl_divergence(student, teacher, 2.0), expected)
    assert kl_divergence(teacher, teacher, 1.0).abs() < 1e-5


def test_sparse_kl_counts_the_other_words_as_one():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    everything = teacher.log_softmax(-1).topk(7)
    full = sparse_kl_divergence(student, everything.indices, everything.values)
    torch.testing.assert_close(full, kl_divergence(student, teacher, 1.0), rtol=1e-4, atol=1e-4)
    top = teacher.log_softmax(-1).topk(2)
    p, q = top.values.exp(), student.softmax(-1).gather(-1, top.indices)
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    expected = (p * (p / q).log()).sum() + (rest_p * (rest_p / rest_q).log()).sum()
    torch.testing.assert_close(sparse_kl_divergence(student, top.indices, top.values), expected)


@pytest.mark.parametrize("tokens", [1, 10, 600])
def test_chunked_kl_equals_plain(tokens):
    torch.manual_seed(0)
    own_head, head = torch.nn.Linear(8, 30), torch.nn.Linear(8, 30)
    own, target = torch.randn(tokens, 8, requires_grad=True), torch.randn(tokens, 8)
    plain = kl_divergence(own_head(own), head(target), 1.5)
    chunked = over_chunks(lambda a, b: kl_divergence(own_head(a), head(b), 1.5), own, target)
    torch.testing.assert_close(chunked, plain)
    inputs = [own, own_head.weight]
    for found, expected in zip(torch.autograd.grad(chunked, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_chunks_never_hold_all_tokens():
    sizes = []

    def watched(state):
        sizes.append(len(state))
        return state.square().sum()

    over_chunks(watched, torch.randn(1000, 4, requires_grad=True)).backward()
    assert max(sizes) == losses.CHUNK_TOKENS
    assert sum(sizes) == 2 * 1000, "each chunk is computed once forward and once more for the backward"


def test_what_is_kept_is_not_computed_again():
    torch.manual_seed(0)
    states, calls = torch.randn(600, 4, requires_grad=True), []

    def watched(state):
        calls.append(len(state))
        return state.square().sum()

    found = over_chunks(watched, states, kept=True)
    torch.testing.assert_close(found, states.square().sum())
    torch.testing.assert_close(torch.autograd.grad(found, states)[0], 2 * states)
    assert sum(calls) == 600


def test_hidden_state_loss():
    x = torch.randn(6, 5)
    assert hidden_state_loss(x, x) < 1e-5
    assert hidden_state_loss(2 * x, x) == pytest.approx((x.square().mean(-1) / x.square().mean()).sum().item(), rel=1e-4)
