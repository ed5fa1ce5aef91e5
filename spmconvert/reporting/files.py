"""Where a report goes: report.json and report.html, and the section of the model card.

Without an output directory the files go into the checkpoint itself and its model card is refreshed. With one, the
checkpoint is not touched and the section is written beside the others as report.md. A comparison of several never
touches them.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from spmconvert.checkpoint.card import REPORT_BEGIN, with_report
from spmconvert.checkpoint.manifest import REPORT_FILES
from spmconvert.errors import NotWritableError, OutputError
from spmconvert.reporting.html import render
from spmconvert.reporting.markdown import section
from spmconvert.reporting.schema import Report
from spmconvert.system.files import write_whole

JSON_NAME, HTML_NAME = REPORT_FILES
MARKDOWN_NAME = "report.md"
COMPARISON_DIRECTORY = "spm-comparison"
# what each file has in its beginning, and nobody else's has
MARKS = {".json": '"schema_version"', ".html": '<meta name="generator" content="spmconvert">', ".md": REPORT_BEGIN}


def check_place(directory: Path, output: Path | None) -> None:
    """Refuse a place where a report would overwrite what is none; cheap, so it can be asked before anything is measured.

    Args:
        directory: where the files go without another place.
        output: another place, or None.

    Raises:
        OutputError: when there is such a file.
        NotWritableError: when a file is where the directory would be.
    """
    place = output or directory
    existing = next((path for path in (place, *place.parents) if os.path.lexists(path)), Path.cwd())
    if not existing.is_dir():
        raise NotWritableError(f"{place} cannot be written ({existing} is no directory); choose another output with -o")
    for name in (JSON_NAME, HTML_NAME, MARKDOWN_NAME):
        file = place / name
        if os.path.lexists(file) and not _is_report(file):
            raise OutputError(f"{file} is no report of spmconvert; move it away or choose another place with -o")


def _is_report(file: Path) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    with file.open("rb") as stream:
        return MARKS[file.suffix].encode() in stream.read(1000)


def write_report(report: Report, directory: Path, output: Path | None) -> Path:
    """Write one report in all forms; returns the HTML file.

    Args:
        report: what to write.
        directory: the checkpoint.
        output: another place; None for the checkpoint itself.

    Raises:
        OutputError: when a file of the same name there is no report.
        NotWritableError: when the place cannot be written.
    """
    check_place(directory, output)
    destination = output or directory
    contents = {JSON_NAME: report.model_dump_json(indent=2) + "\n", HTML_NAME: render([report])}
    if output is None:
        card = directory / "README.md"
        contents[card.name] = with_report(card.read_text(encoding="utf-8") if card.exists() else "", section(report))
    else:
        contents[MARKDOWN_NAME] = f"{MARKS['.md']}\n\n{section(report)}\n"
    return _write(destination, contents)


def write_comparison(reports: Sequence[Report], output: Path | None) -> Path:
    """Write several reports as one page and one JSON list; returns the HTML file.

    Raises:
        OutputError: when a file of the same name there is no report.
        NotWritableError: when the place cannot be written.
    """
    check_place(Path(COMPARISON_DIRECTORY), output)
    listed = json.dumps([report.model_dump(mode="json") for report in reports], indent=2) + "\n"
    return _write(output or Path(COMPARISON_DIRECTORY), {JSON_NAME: listed, HTML_NAME: render(reports)})


def _write(directory: Path, contents: dict[str, str]) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_whole(directory / name, content)
    except OSError as error:
        raise NotWritableError(
            f"{directory} cannot be written ({error.strerror}); choose another output with -o"
        ) from error
    return directory / HTML_NAME
