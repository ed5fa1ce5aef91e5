"""Text that every installation has: prose that comes with this project, and docstrings of Python's standard library.

It is what ``auto`` stands for where a text is asked for, so that a conversion needs neither a file nor a network. The
prose was written for this purpose, on as many subjects and in as many voices as its size allows, since docstrings alone
teach a model programs and little else (docs/results.md). Paragraphs are dealt out by hash to calibration, training and
measuring: nothing is ever measured on what was fitted or trained on, and the same Python version gives the same text. It
is two megabytes; a text like what the model is used for is better.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

from spmconvert.data.documents import SHORTEST_DOCUMENT
from spmconvert.errors import CalibrationError
from spmconvert.recipe.recipe import AUTO_TEXT
from spmconvert.system.caches import cache_directory, check_cache, keep

Part = Literal["calibration", "training", "evaluation", "code"]
# of eight paragraphs three are fitted, one measures, the others are trained on
SHARES: tuple[Part, ...] = (
    "calibration", "calibration", "calibration", "evaluation", "training", "training", "training", "training",
)  # fmt: skip
CODE_LINES = 400
FEWEST_SOURCES = 100
# changes with anything that changes a text
TEXT_VERSION = 4
# paragraphs of prose for each docstring; as many of one as of the other teach less (docs/results.md)
PROSE_PER_DOCSTRING = 4
PROSE = Path(__file__).with_name("prose")
# in other languages than English
FOREIGN = "languages.txt"
# no prose of the library's own
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test")


def library_text(part: Part) -> Path:
    """A .txt file in the cache, one paragraph a line; written where it is not there.

    Args:
        part: what it is for. ``code`` is lines of source code, another domain.

    Raises:
        CalibrationError: when the standard library is here without its sources.
        NotWritableError: when the cache cannot be written.
    """
    version = hashlib.sha256(f"{TEXT_VERSION} {sys.version}".encode()).hexdigest()[:16]
    file = cache_directory("texts") / f"{part}-{version}.txt"
    if not file.exists():
        check_cache("texts")
        for name, lines in _texts().items():
            keep(file.with_name(f"{name}-{version}.txt"), "\n".join(lines) + "\n")
    return file


def english(part: Part) -> list[str]:
    """Paragraphs of a text that are in English."""
    foreign = set(_lines(PROSE / FOREIGN))
    return [line for line in _lines(library_text(part)) if line not in foreign]


def _texts() -> dict[Part, list[str]]:
    texts: dict[Part, list[str]] = {name: [] for name in (*dict.fromkeys(SHARES), "code")}
    sources = list(_sources())
    own, foreign = prose(), set(_lines(PROSE / FOREIGN))
    docstrings = dict.fromkeys(chain.from_iterable(map(_paragraphs, sources)))
    # from all of the files
    few = sorted(docstrings, key=_digest)[: len(own) // PROSE_PER_DOCSTRING]
    for paragraph in [*own, *few]:
        part = SHARES[_digest(paragraph)[0] % len(SHARES)]
        # nothing is measured on languages that a model may never have learnt
        texts["training" if part == "evaluation" and paragraph in foreign else part].append(paragraph)
    for source in sources:
        texts["code"] += [line.strip() for line in source.splitlines() if len(line.strip()) >= SHORTEST_DOCUMENT]
    # every n-th line, from all of the files
    texts["code"] = texts["code"][:: max(1, len(texts["code"]) // CODE_LINES)]
    return texts


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def prose() -> list[str]:
    """Paragraphs that come with this project, in the order of their files."""
    return [line for file in sorted(PROSE.glob("*.txt")) for line in _lines(file)]


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def _sources() -> Iterator[str]:
    """Sources of the standard library.

    Raises:
        CalibrationError: when it is here without them.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(library.rglob("*.py")) if not set(LEFT_OUT) & set(file.relative_to(library).parts)]
    if len(files) < FEWEST_SOURCES:
        raise CalibrationError(
            f"{library} has no sources with docstrings, which {AUTO_TEXT} reads; give a text, or install the sources"
        )
    for file in files:
        yield file.read_text(encoding="utf-8", errors="replace")


def _paragraphs(source: str) -> Iterator[str]:
    """Paragraphs of prose, a line each, from the docstrings of a module and from a dictionary of texts."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        # templates of other tools
        return
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
        elif isinstance(node, ast.Dict) and node.values and all(map(_is_text, node.values)):
            # pydoc_data.topics is one dictionary of texts
            text = "\n\n".join(ast.literal_eval(value) for value in node.values)
        for block in text.split("\n\n"):
            paragraph = " ".join(block.split())
            # examples and tables are no prose
            if len(paragraph) >= SHORTEST_DOCUMENT and ">>>" not in block and "  " not in block.strip():
                yield paragraph


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n\n" in node.value
