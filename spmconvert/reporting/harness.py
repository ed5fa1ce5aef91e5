"""Tasks of lm-evaluation-harness on the dense and the converted model, when the extra is installed.

In a report the harness gets the loaded models, so both are exactly those that the rest of the report measured. Its own
command line loads a checkpoint itself, in a process that imports nothing of ours, and neither it nor transformers looks for
packages that announce a format; so it is run in this one.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spmconvert.checkpoint.converted import open_converted
from spmconvert.errors import OptionError, first_line
from spmconvert.reporting.schema import Task


def check_harness(asked: str = "--tasks") -> None:
    """Refuse what was asked for where the harness is not installed.

    Raises:
        OptionError: naming the extra.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise OptionError(f"{asked} needs lm-evaluation-harness, which is not installed; pip install 'spmconvert[eval]'")


def run_command_line(directory: Path, arguments: Sequence[str]) -> None:
    """Run the harness's own command line on a converted checkpoint, in this process, where the format is registered.

    Args:
        directory: converted checkpoint.
        arguments: options of ``lm_eval run``; ``--model hf`` and the directory are added.

    Raises:
        OptionError: when the harness is not installed, another model is named, or the harness refuses a task or the model.
        CheckpointError: when the directory is no converted checkpoint.
        SystemExit: as the harness does, for options that it does not know.
    """
    check_harness("eval")
    open_converted(directory, recorded=False)
    if any(re.search(r"(^|,|\")pretrained(=|\")", argument) for argument in arguments):
        raise OptionError(f"pretrained is given, and so is the directory {directory}, which stands for it; leave one out")
    from lm_eval.__main__ import cli_evaluate

    # as JSON, since a path may hold commas; what the caller gives of it is merged by the harness
    model = ["--model", "hf", "--model_args", json.dumps({"pretrained": str(directory)})]
    before, sys.argv = sys.argv, ["lm_eval", "run", *model, *arguments]
    try:
        cli_evaluate()
    except (KeyError, ValueError, OSError) as refused:
        raise OptionError(f"lm_eval refuses this ({first_line(refused)}); see lm_eval ls tasks") from refused
    finally:
        sys.argv = before


def run_tasks(converted: Any, dense: Any, tokenizer: Any, names: tuple[str, ...]) -> tuple[Task, ...]:
    """Evaluate both models, the dense one where there is one.

    Raises:
        OptionError: when the harness does not know a task, or cannot run it on this model.
    """
    from lm_eval.tasks import TaskManager

    # it reads what all tasks there are, which takes seconds
    known = TaskManager()
    results = {"converted": _evaluate(converted, tokenizer, names, known)}
    results["dense"] = {} if dense is None else _evaluate(dense, tokenizer, names, known)
    tasks = []
    for (task, metric), (value, error, samples) in results["converted"].items():
        before = results["dense"].get((task, metric))
        tasks.append(
            Task(
                task=task,
                metric=metric,
                dense=None if before is None else before[0],
                converted=value,
                standard_error=error,
                samples=samples,
            )
        )
    return tuple(tasks)


_Results = dict[tuple[str, str], tuple[float, float | None, int]]


def _evaluate(model: Any, tokenizer: Any, names: tuple[str, ...], known: Any) -> _Results:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        answer = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(names), task_manager=known)
    except (KeyError, ValueError, OSError) as refused:
        raise OptionError(f"the tasks {', '.join(names)} cannot be run ({refused}); see lm_eval --tasks list") from None
    return read_results(answer)


def read_results(answer: dict[str, Any]) -> _Results:
    """Value, standard error and samples by task or group of tasks, and metric with its filter where that has a name."""
    results = {}
    for task, values in answer["results"].items():
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{variant}")
            name = metric if variant in ("", "none") else f"{metric}, {variant}"
            results[task, name] = (value, error if isinstance(error, float) else None, _samples(answer, task))
    return results


def _samples(answer: dict[str, Any], task: str) -> int:
    """Samples of a task, or of all tasks of a group."""
    if task in answer["n-samples"]:
        return int(answer["n-samples"][task]["effective"])
    return sum(_samples(answer, part) for part in answer.get("group_subtasks", {}).get(task, ()))
