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


def _evaluate(model: Any, tokenizer: Any, names: tuple[str, ...]) -> dict[tuple[str, str], tuple[float, float | None, int]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        answer = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(names))
    except (KeyError, ValueError, OSError) as refused:
        raise OptionError(f"the tasks {', '.join(names)} cannot be run ({refused}); see lm_eval --tasks list") from None
    found = {}
    for task, values in answer["results"].items():
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{variant}")
            samples = answer["n-samples"][task]["effective"]
            found[task, metric] = (value, error if isinstance(error, float) else None, samples)
    return found
