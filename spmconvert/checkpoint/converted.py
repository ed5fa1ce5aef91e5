"""Opening a converted checkpoint: its config, headers and provenance, for the commands that come after the conversion."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spmconvert.checkpoint.headers import TensorEntry, read_headers
from spmconvert.checkpoint.manifest import (
    INT8_KEY,
    PROVENANCE_FILE,
    QUANT_METHOD,
    LayerSpec,
    check_format_version,
    dense_config,
    single_layers,
)
from spmconvert.checkpoint.provenance import check_provenance
from spmconvert.checkpoint.reader import Checkpoint, check_counts, open_checkpoint
from spmconvert.errors import CheckpointError, CorruptCheckpointError, ModelNotFoundError, OptionError
from spmconvert.system.parsing import parse_json

# what a finetune adds to the name of what it trains
FINETUNED_SUFFIX = "-ft"


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint.

    Attributes:
        directory: where it is.
        config: config.json.
        entries: layer map by module name, one entry for the experts of a projection.
        tensors: headers of all tensors.
        provenance: spm.json; empty where there is none and none is needed.
    """

    directory: Path
    config: dict[str, Any]
    entries: dict[str, LayerSpec]
    tensors: dict[str, TensorEntry]
    provenance: dict[str, Any]

    @cached_property
    def layers(self) -> dict[str, LayerSpec]:
        """Every layer by itself, those of experts too, as the opened model has them."""
        return single_layers(self.entries)

    @property
    def kept(self) -> float:
        """Share of the replaced layers' parameters that is left."""
        records = self.provenance["layers"]
        return float(sum(entry["parameters"] for entry in records) / sum(entry["dense_parameters"] for entry in records))

    def checkpoint(self) -> Checkpoint:
        """The same files as a checkpoint whose tensors can be read."""
        return Checkpoint(self.directory, str(self.directory), None, self.config, self.tensors)


def open_source(converted: Converted, teacher: str | None) -> Checkpoint:
    """The dense checkpoint that a conversion started from, checked by its recorded hash.

    Args:
        converted: the conversion.
        teacher: another place of the source; None for the recorded one.

    Raises:
        ModelNotFoundError: when it is not there any more.
        CheckpointError: when it is another checkpoint.
    """
    recorded = converted.provenance["source"]
    source = open_checkpoint(teacher or recorded["name"], revision=None if teacher else recorded["revision"])
    if source.sha256() != recorded["sha256"]:
        raise CheckpointError(
            f"{source.directory} is not the checkpoint that {converted.directory} was converted from (another hash); "
            "name the right one with --teacher"
        )
    return source


def open_converted(directory: Path, *, recorded: bool = True) -> Converted:
    """Open a converted checkpoint.

    Args:
        directory: where it is.
        recorded: whether it needs its provenance, which only this tool writes; without it what ``save_pretrained`` and the
            trainers of other libraries wrote of a converted model will do, too.

    Raises:
        ModelNotFoundError: when there is no such directory.
        CheckpointError: when it was not written by a conversion.
        CorruptCheckpointError: when its files contradict each other.
    """
    if not directory.is_dir():
        raise ModelNotFoundError(f"there is no directory {directory}; give the output of spmconvert convert")
    config = _read_json(directory / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{directory} is not a converted checkpoint; convert it first with spmconvert convert")
    check_format_version(quantization.get("format_version"))
    if quantization.get(INT8_KEY) is not None:
        raise CheckpointError(
            f"{directory} is quantised ({quantization[INT8_KEY]}), which only from_pretrained and load read; give "
            "the converted checkpoint that it was made from"
        )
    entries = quantization.get("layers")
    if not isinstance(entries, dict) or not entries:
        raise CorruptCheckpointError(f"config.json in {directory} has no layer map; download it or convert again")
    tensors = read_headers(directory)
    check_counts(directory / "config.json", dense_config(config), tensors)
    layers = {name: LayerSpec.from_json(name, entry) for name, entry in entries.items()}
    if not (directory / PROVENANCE_FILE).is_file():
        if not recorded:
            return Converted(directory, config, layers, tensors, {})
        raise CheckpointError(
            f"{directory} has no {PROVENANCE_FILE}, which save_pretrained does not write and this command needs; put that "
            "of the conversion there, or convert the source by spmconvert convert"
        )
    provenance = _read_json(directory / PROVENANCE_FILE)
    check_provenance(directory, provenance, set(single_layers(layers)))
    return Converted(directory, config, layers, tensors, provenance)


def only_converted(directory: Path, *, finetuned: bool = True) -> Path:
    """The only converted checkpoint in a directory, for commands that are given none.

    Args:
        directory: where it is.
        finetuned: of a checkpoint and what a finetune made of it take that; otherwise what it was made of.

    Raises:
        OptionError: when there is none, or more than one.
    """
    checkpoints = [
        path.parent for path in sorted(directory.glob(f"*/{PROVENANCE_FILE}")) if not path.parent.name.startswith(".")
    ]
    names = {path.name for path in checkpoints}
    passed_over = {
        name if finetuned else f"{name}{FINETUNED_SUFFIX}" for name in names if f"{name}{FINETUNED_SUFFIX}" in names
    }
    checkpoints = [path for path in checkpoints if path.name not in passed_over]
    if len(checkpoints) == 1:
        return checkpoints[0]
    what = f"has {', '.join(path.name for path in checkpoints)}" if checkpoints else "has no converted checkpoint"
    raise OptionError(f"no directory is given and {directory} {what}; name the one you mean")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}; give the output of spmconvert convert") from None
    except ValueError:
        raise CheckpointError(f"{file} is not JSON; convert again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object; convert again")
    return content
