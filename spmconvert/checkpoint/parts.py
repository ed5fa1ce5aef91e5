"""Finished parts of an unfinished run: a file each, with tensors and a record of JSON values in its header.

Records and single tensors are read without the rest, so that what was finished need not be in memory together.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spmconvert.errors import CorruptCheckpointError, OutputError
from spmconvert.system.files import write_whole
from spmconvert.system.parsing import parse_json

if TYPE_CHECKING:
    import torch


class Parts:
    """A folder of finished parts, by name.

    Args:
        folder: made when the first part is stored.

    Raises:
        CorruptCheckpointError: from all that reads, when a part's file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _file(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def store(self, name: str, tensors: "dict[str, torch.Tensor]", record: dict[str, Any]) -> None:
        """Keep a part; it is there whole or not at all."""
        from safetensors.torch import save

        self._folder.mkdir(exist_ok=True)
        content = save({key: tensor.contiguous() for key, tensor in tensors.items()}, {"record": json.dumps(record)})
        write_whole(self._file(name), content, durable=True)

    def load(self, name: str) -> "tuple[dict[str, torch.Tensor], dict[str, Any]] | None":
        """All tensors and the record of a part, or None where there is none."""
        record = self.record(name)
        return None if record is None else ({key: self.tensor(name, key) for key in self.keys(name)}, record)

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a part, or None where there is none."""
        if not self._file(name).exists():
            return None
        with self._opened(name) as part:
            found = parse_json(part.metadata()["record"])
            if not isinstance(found, dict):
                raise TypeError("a record is a table")
            return found

    def keys(self, name: str) -> list[str]:
        """Names of a part's tensors."""
        with self._opened(name) as part:
            return list(part.keys())

    def tensor(self, name: str, key: str) -> "torch.Tensor":
        """One tensor of a part."""
        with self._opened(name) as part:
            tensor: torch.Tensor = part.get_tensor(key)
            return tensor

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        file = self._file(name)
        try:
            with safe_open(file, "pt") as part:
                yield part
        except FileNotFoundError:
            raise OutputError(f"{file} of the unfinished run is gone; start again without --resume") from None
        except (SafetensorError, TypeError, KeyError, ValueError):
            raise CorruptCheckpointError(f"{file} of the unfinished run is damaged; discard the run with --force") from None
