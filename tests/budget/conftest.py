"""A machine whose times are known, for budgets of time."""

import pytest

from spmconvert.budget import speed
from spmconvert.budget.times import TimeTable
from spmconvert.commands import convert as convert_module


def by_parameters(models, *_):
    """Seconds that are proportional to the parameters of a model."""
    return {name: 1e-6 * sum(p.numel() for p in model.parameters()) for name, model in models.items()}


@pytest.fixture
def proportional(monkeypatch):
    """A machine on which everything takes a microsecond for each of its parameters."""
    monkeypatch.setattr(TimeTable, "dense", lambda self, *sizes: 1e-6 * sizes[0] * sizes[1])
    monkeypatch.setattr(TimeTable, "seconds", lambda self, design: 1e-6 * design.parameter_count(bias=False))
    monkeypatch.setattr(speed, "forward_seconds", by_parameters)
    monkeypatch.setattr(convert_module, "forward_seconds", by_parameters)
