"""What an interrupted conversion or finetune has left so far, from its working directory ``.NAME.partial``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmconvert.checkpoint.places import RUN_FILE, STATE_FILE, partial_directory
from spmconvert.errors import CorruptCheckpointError
from spmconvert.system.parsing import parse_json


@dataclass(frozen=True)
class Unfinished:
    """An output that is not there yet.

    Attributes:
        output: the directory that will appear.
        layers: records of the finished layers, in the order in which they were finished.
        has_state: whether the run keeps a training state instead of layers.
    """

    output: Path
    layers: tuple[dict[str, Any], ...]
    has_state: bool

    @property
    def progress(self) -> str:
        """How far it got, in words."""
        if self.has_state:
            return "a finetune has kept its state"
        return f"{len(self.layers)} layers are fitted" if self.layers else "no layer is fitted yet"


def find_unfinished(directory: Path) -> Unfinished | None:
    """The unfinished run behind a directory that does not exist, or the working directory itself; None where there is none.

    Raises:
        CorruptCheckpointError: when a finished layer of it is damaged.
    """
    if directory.name.startswith(".") and directory.name.endswith(".partial"):
        output = directory.with_name(directory.name.removeprefix(".").removesuffix(".partial"))
    else:
        output = directory
    partial = partial_directory(output)
    if output.exists() or not (partial / RUN_FILE).is_file():
        return None
    files = sorted((partial / "layers").glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    return Unfinished(output, tuple(_record(file) for file in files), (partial / STATE_FILE).exists())


def _record(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            found: dict[str, Any] = parse_json(opened.metadata()["record"])
            return {"name": found["name"], **found}
    except (SafetensorError, TypeError, KeyError, ValueError):
        raise CorruptCheckpointError(f"{file} of the unfinished run is damaged; discard the run with --force") from None
