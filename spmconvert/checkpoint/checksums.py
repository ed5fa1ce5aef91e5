"""The hashes of a checkpoint's files: what it was when it was written, and by that, which files this tool wrote."""

import hashlib
from pathlib import Path

from spmconvert.checkpoint.manifest import CHECKSUM_FILE, PROVENANCE_FILE

# written beside the listed files and free to change: the card may be edited, and the provenance holds times
UNLISTED_FILES = ("README.md", PROVENANCE_FILE)


def write_checksums(directory: Path) -> None:
    """Note the hashes of the files that decide what the model computes, in the form that sha256sum -c reads.

    The model card may be edited, and the provenance holds times, so that equal runs would differ.
    """
    lines = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in (*UNLISTED_FILES, CHECKSUM_FILE):
            with path.open("rb") as stream:
                lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {name}\n")
    (directory / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")


def read_checksums(directory: Path) -> dict[str, str]:
    """Hashes by the path of the file inside of the directory; the file with them exists."""
    lines = (directory / CHECKSUM_FILE).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
