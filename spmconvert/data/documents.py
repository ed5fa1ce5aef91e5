"""Documents of a text: lines of .txt, rows of .jsonl and .parquet, items of a dataset.

Documents shorter than a few words (headings, captions) are left out where there are longer ones.
"""

import hashlib
from pathlib import Path
from typing import Any

from spmconvert.errors import CalibrationError, OptionError, first_line
from spmconvert.recipe.recipe import DATASET_PREFIX
from spmconvert.system.files import file_hash
from spmconvert.system.parsing import parse_json

SHORTEST_DOCUMENT = 64
PLAIN_SUFFIXES = ("", ".txt", ".md", ".raw", ".tokens")


def read_documents(source: Path | str, column: str = "text") -> list[str]:
    """Documents of a .txt, .jsonl or .parquet file, or of ``datasets:ID[:CONFIGURATION[:SPLIT]]``.

    Args:
        source: path of the file, or name of the dataset.
        column: name of the text in .jsonl, .parquet and datasets.

    Raises:
        CalibrationError: when the source cannot be read, has another form, or holds no document.
        OptionError: when reading it needs a package that is not installed.
    """
    file = Path(source)
    if str(source).startswith(DATASET_PREFIX):
        documents = _from_dataset(str(source), column)
    elif file.suffix == ".parquet":
        documents = _from_parquet(file, column)
    elif file.suffix == ".jsonl":
        documents = [_text_of(line, number, file, column) for number, line in enumerate(_lines(file), 1) if line.strip()]
    elif file.suffix in PLAIN_SUFFIXES:
        documents = _lines(file)
    else:
        raise CalibrationError(f"text file {file} has the form {file.suffix}; give a .txt, .jsonl or .parquet file")
    stripped = [document.strip() for document in documents if document.strip()]
    if not stripped:
        raise CalibrationError(f"text file {source} is empty; give a text of at least a few hundred lines")
    return [document for document in stripped if len(document) >= SHORTEST_DOCUMENT] or stripped


def content_hash(source: Path | str, documents: list[str] | None = None) -> str:
    """SHA-256 of a text: of its file's bytes, or of the documents of a dataset, which has no file.

    Args:
        source: as for ``read_documents``.
        documents: what it holds, where that has been read already.

    Raises:
        CalibrationError: when it cannot be read.
    """
    if str(source).startswith(DATASET_PREFIX):
        joined = "\n".join(read_documents(source) if documents is None else documents)
        return hashlib.sha256(joined.encode()).hexdigest()
    try:
        return file_hash(Path(source))
    except OSError as error:
        raise CalibrationError(f"text file {source} cannot be read: {error.strerror}; check the path") from None


def _lines(file: Path) -> list[str]:
    try:
        # str.splitlines would also cut at separators that JSON and running text may contain
        return file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"text file {file} is not UTF-8 at byte {error.start}; convert it to UTF-8") from None
    except OSError as error:
        raise CalibrationError(f"text file {file} cannot be read: {error.strerror}; check the path") from None


def _text_of(line: str, number: int, file: Path, column: str) -> str:
    try:
        record = parse_json(line)
    except ValueError:
        raise CalibrationError(f"line {number} of {file} is not JSON; give one object a line") from None
    if not isinstance(record, dict) or not isinstance(record.get(column), str):
        raise CalibrationError(
            f"line {number} of {file} has no text under {column!r}; name the column of the documents {column}"
        )
    text = str(record[column])
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CalibrationError(
            f"line {number} of {file} has half of a character (a surrogate) under {column!r}; write the text again as UTF-8"
        ) from None
    return text


def _from_parquet(file: Path, column: str) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise OptionError(f"{file} needs pyarrow; install spmconvert[data], or give a .jsonl file") from None
    try:
        names = parquet.read_schema(file).names
        values = parquet.read_table(file, columns=[column]).column(column).to_pylist() if column in names else None
    except (OSError, ArrowException) as error:
        raise CalibrationError(f"text file {file} cannot be read: {first_line(error)}; check the path") from None
    return _column_of(values, str(file), column, names)


def _from_dataset(source: str, column: str) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise OptionError(f"{source} needs the package datasets; install spmconvert[data]") from None
    name, _, rest = source.removeprefix(DATASET_PREFIX).partition(":")
    configuration, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:
        # whatever the hub, the builder or the cache raises; all of it means that the dataset cannot be had
        raise CalibrationError(f"dataset {source} cannot be loaded: {first_line(error)}") from error
    names = rows.column_names
    return _column_of(list(rows[column]) if column in names else None, source, column, names)


def _column_of(values: list[Any] | None, source: str, column: str, names: list[str]) -> list[str]:
    if values is None:
        raise CalibrationError(
            f"{source} has no column {column!r}; it has {', '.join(names)}: name one of them with column"
        )
    return [value for value in values if isinstance(value, str)]
