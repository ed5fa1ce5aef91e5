"""The headers of safetensors files: which tensors a checkpoint has, where their bytes lie, and whether that adds up.

A header is read and checked before anything trusts it: the file must be exactly as long as its header says, without holes
or overlaps, and an index may only name files beside it. This module does not import torch.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmconvert.errors import CheckpointError, CorruptCheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# dtypes that a layer can be fitted in, and their names in torch
SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint.

    Attributes:
        name: tensor name.
        dtype: dtype as the header spells it, such as ``F32`` or ``BF16``.
        shape: shape.
        file: file that holds it.
        start: offset of its first byte in the file.
        end: offset after its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.end - self.start


def read_headers(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint directory, in the order of files and offsets.

    A single ``model.safetensors`` wins over an index, as in transformers.

    Raises:
        CheckpointError: when there are no safetensors weights.
        CorruptCheckpointError: when headers, files and index contradict each other.
    """
    if (directory / SINGLE_FILE).is_file():
        return read_header(directory / SINGLE_FILE)
    if (directory / INDEX_FILE).is_file():
        return _read_sharded(directory)
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{directory} has only pickle weights ({pickles[0]}), which can run code and are never read; "
            "save it again as safetensors with transformers' save_pretrained"
        )
    raise CheckpointError(
        f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE}; give the directory of a safetensors checkpoint"
    )


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, by offset.

    Raises:
        CorruptCheckpointError: when the file is truncated, has bytes to spare, or its header is not consistent.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise _corrupt(file, f"is {size} bytes long, its header alone claims {length}")
        content = stream.read(length)
    try:
        header = json.loads(content)
    except (ValueError, RecursionError):
        raise _corrupt(file, "has a header that is not JSON") from None
    if not isinstance(header, dict):
        raise _corrupt(file, "has a header that is not a JSON object")
    header.pop("__metadata__", None)
    entries = sorted(
        (_entry(file, name, value, 8 + length) for name, value in header.items()), key=lambda e: (e.start, e.end)
    )
    position = 8 + length
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the one before it" if entry.start < position else "leaves a hole before it"
            raise _corrupt(file, f"has tensor {entry.name} at byte {entry.start}, which {kind} (expected {position})")
        position = entry.end
    if position != size:
        raise _corrupt(file, f"is {size} bytes long, its header says {position}")
    return {entry.name: entry for entry in entries}


def _entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        bits, shape, (start, end) = _BITS[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _corrupt(file, f"has tensor {name} with a header entry that is not understood") from None
    plain = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    if not plain or (end - start) * 8 != bits * math.prod(shape):
        extent = f"{value['dtype']} {list(shape)} at bytes {start} to {end}"
        raise _corrupt(file, f"has tensor {name} of {extent}, which does not fit")
    return TensorEntry(name, value["dtype"], shape, file, data_start + start, data_start + end)


def _read_sharded(directory: Path) -> dict[str, TensorEntry]:
    index = directory / INDEX_FILE
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _corrupt(index, "has no weight_map") from None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise _corrupt(index, "has a weight_map that is not a table of file names")
    found: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise _corrupt(index, f"names the file {shard!r}, which is not beside it")
        if not (directory / shard).is_file():
            raise _corrupt(index, f"names the file {shard!r}, which is missing")
        for name, entry in read_header(directory / shard).items():
            if weight_map.get(name) != shard:
                raise _corrupt(index, f"does not say that tensor {name} is in {shard}")
            found[name] = entry
    for name, shard in weight_map.items():
        if name not in found:
            raise _corrupt(index, f"says that tensor {name} is in {shard}, which does not have it")
    return found


def _corrupt(file: Path, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{file} {what}; the file is damaged, download or save it again")
