"""The hashes that a finished checkpoint carries about its own files, in the form that ``sha256sum -c`` reads.

They are of the files that decide what the model computes. Left out are the model card, which may be edited; the provenance,
which holds times, so that equal runs would differ; what a later report leaves there; and hidden files, which version
control and downloads keep for themselves. The list shows damage and stray changes; whoever changes a file on purpose can
change it too. This module does not import torch.
"""

import re
from pathlib import Path, PurePosixPath

from spmconvert.checkpoint.manifest import CHECKSUM_FILE, PROVENANCE_FILE, REPORT_FILES
from spmconvert.errors import CheckpointError, CorruptCheckpointError
from spmconvert.system.files import file_hash

UNLISTED_FILES = ("README.md", PROVENANCE_FILE, CHECKSUM_FILE, *REPORT_FILES)
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def listed_files(directory: Path) -> list[str]:
    """Names of the files that the list of a checkpoint has to have, relative and with slashes, sorted."""
    paths = (path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file())
    return [
        path.as_posix()
        for path in paths
        if path.as_posix() not in UNLISTED_FILES and not any(part.startswith(".") for part in path.parts)
    ]


def write_checksums(directory: Path) -> None:
    """Write the list of a finished checkpoint into its directory.

    Raises:
        OSError: as the system does.
    """
    lines = (f"{file_hash(directory / name)}  {name}\n" for name in listed_files(directory))
    (directory / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")


def read_checksums(directory: Path) -> dict[str, str]:
    """The SHA-256 (hexadecimal) of every listed file by its relative name, as it was when the checkpoint was written.

    Raises:
        CheckpointError: when there is no list, or it cannot be read.
        CorruptCheckpointError: when a line is not a hash and a name inside of the directory.
    """
    file = directory / CHECKSUM_FILE
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {CHECKSUM_FILE}; convert again to have one") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); check its permissions") from None
    except UnicodeDecodeError:
        raise CorruptCheckpointError(f"{file} is not UTF-8; convert again") from None
    hashes: dict[str, str] = {}
    for number, line in enumerate(filter(None, lines), 1):
        match = _LINE.fullmatch(line)
        name = PurePosixPath(match[2] if match else "..")
        if match is None or name.is_absolute() or ".." in name.parts or match[2] in hashes:
            raise CorruptCheckpointError(
                f"line {number} of {file} is not a hash and the name of one more file beside it; convert again"
            )
        hashes[match[2]] = match[1]
    return hashes
