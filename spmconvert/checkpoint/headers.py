"""The headers of safetensors files: which tensors a checkpoint has, where their bytes lie, and whether that adds up.

Every file is first opened by the safetensors library, which refuses truncated files, bytes to spare, overlaps, holes and
shapes that do not fit; then its header says where the bytes of a tensor lie, which the library keeps to itself. An index
may only name files beside it, and has to agree with them. This module does not import torch.
"""

from dataclasses import dataclass
from pathlib import Path

from spmconvert.errors import CheckpointError, CorruptCheckpointError, first_line
from spmconvert.system.parsing import parse_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# dtypes that a layer can be fitted in, and their names in torch
SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as stream:
        try:
            with safe_open(file, "numpy"):
                length = int.from_bytes(stream.read(8), "little")
                header = parse_json(stream.read(length))
        except SafetensorError as error:
            raise _corrupt(file, f"is refused ({first_line(error)})") from None
    header.pop("__metadata__", None)
    entries = (
        TensorEntry(name, entry["dtype"], tuple(entry["shape"]), file, *(8 + length + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    )
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: (entry.start, entry.end))}


def _read_sharded(directory: Path) -> dict[str, TensorEntry]:
    index = directory / INDEX_FILE
    try:
        weight_map = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise _corrupt(index, "has no weight_map") from None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise _corrupt(index, "has a weight_map that is not a table of file names")
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise _corrupt(index, f"names the file {shard!r}, which is not beside it")
        if not (directory / shard).is_file():
            raise _corrupt(index, f"names the file {shard!r}, which is missing")
        for name, entry in read_header(directory / shard).items():
            if name in tensors:
                raise _corrupt(directory / shard, f"has the tensor {name}, which {tensors[name].file.name} has, too")
            # what shards have counts, as in transformers: indexes on the hub may name more or fewer tensors
            tensors[name] = entry
    return tensors


def _corrupt(file: Path, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{file} {what}; the file is damaged, download or save it again")
