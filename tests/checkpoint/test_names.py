"""Names with and without the prefix of the base model, and the ones that only look alike."""

import pytest

from spmconvert.checkpoint.names import resolve_name, shared_prefix
from spmconvert.errors import CorruptCheckpointError

# a tower inside of another: every name of the outer one ends one of the inner one's
TOWERS = ["encoder.layer.0.fc", "encoder.layer.1.fc", "qformer.encoder.layer.0.fc", "qformer.encoder.layer.1.fc"]


@pytest.mark.parametrize(
    ("name", "known", "prefix", "expected"),
    [
        ("bert.a", ["a", "bert.a"], "bert", "bert.a"),
        ("bert.a", ["a"], "bert", "a"),
        ("a", ["bert.a"], "bert", "bert.a"),
        ("a", ["bert.a"], "", None),
        ("a", ["other.a"], "bert", None),
        ("encoder.layer.0.fc", TOWERS, "blip", "encoder.layer.0.fc"),
        ("encoder.layer.0.fc", TOWERS[2:], "blip", None),
        ("bertlike.a", ["like.a", "a"], "bert", None),
    ],
)
def test_resolve_name(name, known, prefix, expected):
    assert resolve_name(name, known, prefix) == expected
    assert resolve_name(name, known[::-1], prefix) == expected


@pytest.mark.parametrize(
    ("names", "known", "prefix"),
    [
        (["encoder.layer.0.fc"], TOWERS, ""),
        (["encoder.layer.0.fc"], TOWERS[::-1], ""),
        (["bert.x.0", "bert.x.1"], ["x.0", "x.1", "y"], "bert"),
        (["x.0", "x.1"], ["bert.x.0", "bert.x.1", "y"], "bert"),
        # the head has no prefix on either side
        (["x.0", "head"], ["bert.x.0", "head"], "bert"),
        ([], ["a"], ""),
    ],
)
def test_shared_prefix(names, known, prefix):
    assert shared_prefix(names, known) == prefix


@pytest.mark.parametrize(
    ("names", "known", "words"),
    [
        (["x.0"], ["a.x.0", "b.x.0"], "several places for it .a, b."),
        (["x.0"], ["y.0"], "no tensors of it"),
        # one fits the first layer and not the second
        (["encoder.layer.0.fc", "encoder.layer.7.fc"], TOWERS[2:], "no tensors of it"),
    ],
)
def test_names_that_are_not_there_or_in_two_places(names, known, words):
    with pytest.raises(CorruptCheckpointError, match=words):
        shared_prefix(names, known)
