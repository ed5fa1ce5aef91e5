"""Run one experiment: train, measure, time, print the table, and write the JSON after every width."""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.common import save_json
from benchmarks.environment import environment
from benchmarks.paper.settings import EXPERIMENTS, Experiment, Settings, load
from benchmarks.paper.structures import DENSE, LINEARS, hidden_width, parameters
from benchmarks.paper.training import Task, step_seconds, train


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    files = {"data": options.data, "test": options.test}
    overrides = {key: getattr(options, key) for key in ("widths", "timed_widths", "seeds", "steps", "repetitions")}
    settings, experiment = load(options.experiment, **files, **overrides)
    result: dict[str, Any] = {
        "environment": environment("cpu", "float32", options.threads),
        "experiment": options.experiment,
        "measure": experiment.measure,
        "settings": vars(settings) | {"experiment": {key: plain(value) for key, value in settings.experiment.items()}},
        "rows": [],
    }
    for width in sorted({*settings.widths, *settings.timed_widths}):
        for row in run_width(experiment, settings, width):
            result["rows"].append(row)
        save_json(options.json, result)
    show(result)


def plain(value: Any) -> Any:
    """A setting as JSON has it: of a file its name, wherever it lies."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.name if isinstance(value, Path) else value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--data", type=Path, nargs="+", help="text to train on, for classification and shakespeare")
    parser.add_argument("--test", type=Path, help="labelled texts that are only measured, for classification")
    parser.add_argument("--widths", type=int, nargs="*", help="widths to train and time at")
    parser.add_argument("--timed-widths", type=int, nargs="*", help="widths to time only")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repetitions", type=int, help="steps that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.experiment != "compositional" and options.data is None:
        parser.error(f"{options.experiment} needs --data")
    if options.experiment != "classification" and options.test is not None:
        parser.error(f"{options.experiment} takes no --test")
    if options.experiment == "compositional" and options.data is not None:
        parser.error("compositional makes its own data; leave --data out")
    return options


def run_width(experiment: Experiment, settings: Settings, width: int) -> list[dict[str, Any]]:
    """Rows of all tasks and structures at one width; the first task's step times stand for all of them."""
    rows: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    for task in experiment.tasks(width, settings.seeds[0]):
        models = {structure: make(task, width, structure, 0) for structure in LINEARS}
        seconds = seconds or step_seconds(models, task, settings.repetitions)
        for structure, model in models.items():
            size = {"hidden": hidden_of(task, width, structure), "parameters": parameters(model)}
            pace = {"milliseconds": 1e3 * seconds[structure], "dense/this": seconds[DENSE] / seconds[structure]}
            rows.append({"task": task.name, "width": width, "structure": structure, **size, **pace})
        if width not in settings.widths:
            return rows
    for seed in settings.seeds:
        for task in experiment.tasks(width, seed):
            for row in rows:
                if row["task"] == task.name:
                    learn(task, row, settings, seed)
    for row in rows:
        summarise(row, experiment.measure)
    return rows


def learn(task: Task, row: dict[str, Any], settings: Settings, seed: int) -> None:
    """Train with one seed; the first one tries all rates and keeps the best by validation loss."""
    rates = [row["rate"]] if "rate" in row else settings.rates[row["structure"]]
    outcomes = {}
    began = time.perf_counter()
    for rate in rates:
        outcomes[rate] = train(make(task, row["width"], row["structure"], seed), task, rate, settings.steps, seed)
    best = min(outcomes, key=lambda rate: outcomes[rate].validation)
    if "rate" not in row:
        row |= {"rate": best, "all_rates": {f"{rate:g}": outcome.validation for rate, outcome in outcomes.items()}}
    row.setdefault("seeds", []).append({"seed": seed, **vars(outcomes[best])})
    print(f"{task.name}: width {row['width']}, {row['structure']}, seed {seed}: {outcomes[best]}", flush=True)
    row["training_seconds"] = row.get("training_seconds", 0) + time.perf_counter() - began


def summarise(row: dict[str, Any], measure: str) -> None:
    """Mean and standard deviation over seeds of what the experiment measures."""
    row["mean"], row["deviation"] = spread(measured(row, measure))


def measured(row: dict[str, Any], measure: str) -> list[float]:
    """What the experiment measures, a seed each."""
    return [one["accuracy"] if measure == "accuracy" else one["test"] / math.log(2) for one in row["seeds"]]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def hidden_of(task: Task, width: int, structure: str) -> int:
    """Hidden width of the network."""
    return hidden_width(task.build, width, structure, task.granularity)


def make(task: Task, width: int, structure: str, seed: int) -> nn.Module:
    """An untrained network."""
    hidden = hidden_of(task, width, structure)
    torch.manual_seed(seed)
    return task.build(hidden, LINEARS[structure])


def show(result: dict[str, Any]) -> None:
    """The table, and the claim that it is to be held against."""
    measure = result["measure"]
    table = Table("task", "width", "structure", "parameters", measure, "minus dense", "rate", "ms a step", "dense/this")
    dense = {(row["task"], row["width"]): row for row in result["rows"] if row["structure"] == DENSE}
    for row in result["rows"]:
        learned = ["", "", ""]
        if "seeds" in row:
            pairs = zip(measured(row, measure), measured(dense[row["task"], row["width"]], measure), strict=True)
            difference, deviation = spread([own - other for own, other in pairs])
            learned = [
                f"{row['mean']:.3f} ± {row['deviation']:.3f}",
                f"{difference:+.3f} ± {deviation:.3f}",
                f"{row['rate']:g}",
            ]
        pace = [f"{row['milliseconds']:.1f}", f"{row['dense/this']:.2f}"]
        table.add_row(row["task"], str(row["width"]), row["structure"], f"{row['parameters']:,}", *learned, *pace)
    console = Console(width=160)
    console.print(" ".join(f"{key}={value}" for key, value in result["environment"].items()))
    console.print(table)
    console.print(
        f"Mean ± standard deviation over {len(result['settings']['seeds'])} seeds; dense/this: ratio of step times."
    )
    console.print(f"The paper's claim: {result['settings']['claim']}.")


if __name__ == "__main__":
    main()
