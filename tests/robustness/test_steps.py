"""A kill, a torn file and a full disk at steps of every command that writes: a few here, all of them when marked slow.

``campaign`` says what has to hold. It is a process of its own, which forks once everything is imported and before anything
has started a thread.
"""

import json
import subprocess
import sys

import pytest

from tests.robustness.campaign import COMMANDS


def campaign(*arguments):
    command = [sys.executable, "-m", "tests.robustness.campaign", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in ended.stdout.splitlines()]
    assert results, ended.stderr
    return results


def test_some_steps():
    results = campaign("convert", "in-place", "--most", "3")
    assert [result["wrong"] for result in results] == [[], []]
    assert all(result["kills"] == 6 and result["full"] == 3 and result["steps"] > 40 for result in results)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_step(name):
    (result,) = campaign(name)
    assert result["wrong"] == []
    assert result["kills"] > result["steps"]
