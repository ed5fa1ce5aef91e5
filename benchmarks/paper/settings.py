"""Settings of a run: one TOML file an experiment, in this directory; the command line overrides a few of them."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.paper.classification import Classification
from benchmarks.paper.compositional import Compositional
from benchmarks.paper.shakespeare import Shakespeare
from benchmarks.paper.training import Task


class Experiment(Protocol):
    """Makes the tasks at a width, and says what is measured."""

    @property
    def measure(self) -> str:
        """``accuracy`` or ``bits a character``."""

    def tasks(self, width: int, seed: int) -> Iterator[Task]:
        """Tasks at a width."""


EXPERIMENTS = {"compositional": Compositional, "classification": Classification, "shakespeare": Shakespeare}


@dataclass(frozen=True)
class Settings:
    """What every experiment needs.

    Attributes:
        widths: widths to train and time at.
        timed_widths: widths at which only a step is timed.
        seeds: the first one chooses the learning rate.
        steps: steps of the optimizer.
        repetitions: steps that are timed.
        rates: learning rates to try, by structure.
        claim: what the paper says of the experiment.
        experiment: the experiment's own settings.
    """

    widths: list[int]
    timed_widths: list[int]
    seeds: list[int]
    steps: int
    repetitions: int
    rates: dict[str, list[float]]
    claim: str
    experiment: dict[str, Any]


def load(name: str, **overrides: Any) -> tuple[Settings, Experiment]:
    """Read an experiment's file; overrides that are None do not count."""
    content = tomllib.loads((Path(__file__).parent / f"{name}.toml").read_text(encoding="utf-8"))
    for key, value in overrides.items():
        if value is not None:
            (content["experiment"] if key in ("data", "test") else content)[key] = value
    settings = Settings(**content)
    return settings, EXPERIMENTS[name](**settings.experiment)
