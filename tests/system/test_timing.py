"""What times of calls that were made in turn say about them."""

import random
import statistics

import pytest

from spmconvert.system.timing import compared_seconds, interleaved_seconds


def test_calls_are_compared_round_by_round():
    # the machine is three times slower in two of the rounds
    times = {"dense": [2.0, 6.0, 6.0, 2.0, 2.0], "converted": [1.0, 3.0, 3.0, 1.0, 1.0], "rest": [0.5, 1.5, 1.5, 0.5, 9.0]}
    assert compared_seconds(times) == {"dense": 2.0, "converted": 1.0, "rest": 0.5}
    assert compared_seconds({"dense": [3.0, 1.0, 2.0]}) == {"dense": 2.0}


def test_a_machine_that_changes_while_it_is_timed_disturbs_a_comparison_less_than_medians():
    generator = random.Random(0)
    by_round, by_median = [], []
    for _ in range(200):
        speeds = [generator.uniform(1, 1.5) for _ in range(15)]
        dense = [speed * generator.uniform(1, 1.05) for speed in speeds]
        converted = [speed * generator.uniform(1, 1.05) / 1.2 for speed in speeds]
        found = compared_seconds({"dense": dense, "converted": converted})
        by_round.append(found["dense"] / found["converted"])
        by_median.append(statistics.median(dense) / statistics.median(converted))
    assert statistics.mean(by_round) == pytest.approx(1.2, rel=0.01)
    assert statistics.stdev(by_round) < 0.6 * statistics.stdev(by_median)


def test_rounds_that_are_made_at_least():
    called = []
    times = interleaved_seconds({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 0.0, "cpu", fewest=4)
    assert {name: len(own) for name, own in times.items()} == {"a": 4, "b": 4}
    # once before, and then in an order that rotates
    assert "".join(called) == "ab" + "ab" + "ba" + "ab" + "ba"
