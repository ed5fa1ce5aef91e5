"""The benchmark of a companion's penalty, on a layer that takes no time."""

import argparse

import torch

from benchmarks import companion
from benchmarks.common import Layer
from spmconvert.calibrate.statistics import ActivationStatistics
from spmconvert.fit import problem


def test_companion():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 24, generator=generator) * torch.logspace(0, -1, 24)
    statistics = ActivationStatistics.of(inputs)
    layer = Layer("a", torch.randn(16, 24, generator=generator), torch.zeros(16), statistics, statistics)
    options = argparse.Namespace(rank=4, iterations=4)
    rows = [companion.measure(layer, penalty, options) for penalty in (0.0, 10.0)]
    assert problem.DUPLICATION_PENALTY == 1e-3, "as it was"
    assert all(0 < row["error"] < 1 and row["bfloat16"] > row["float16"] > 0 for row in rows)
    assert rows[1]["stages"] < rows[0]["stages"]
