"""Tasks of lm-evaluation-harness on the dense and the converted model, when the extra is installed.

The harness gets the loaded models, so both are exactly those that the rest of the report measured.
"""

import importlib.util
from typing import Any

from spmconvert.errors import OptionError
from spmconvert.reporting.schema import Task


def check_harness() -> None:
    """Refuse tasks where the harness is not installed.

    Raises:
        OptionError: naming the extra.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise OptionError("--tasks needs lm-evaluation-harness, which is not installed; pip install 'spmconvert[eval]'")


def run_tasks(converted: Any, dense: Any, tokenizer: Any, names: tuple[str, ...]) -> tuple[Task, ...]:
    """Evaluate both models, the dense one where there is one.

    Raises:
        OptionError: when the harness does not know a task, or cannot run it on this model.
    """
    results = {"converted": _evaluate(converted, tokenizer, names)}
    results["dense"] = {} if dense is None else _evaluate(dense, tokenizer, names)
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


def _evaluate(model: Any, tokenizer: Any, names: tuple[str, ...]) -> _Results:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        answer = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(names))
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
