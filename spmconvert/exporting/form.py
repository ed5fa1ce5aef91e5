"""What every format answers: how large it gets, and how it is written into an output that has not appeared yet."""

from dataclasses import dataclass
from typing import Any, Protocol

from spmconvert.checkpoint.converted import Converted
from spmconvert.checkpoint.manifest import dense_config
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.errors import UnsupportedLayerError
from spmconvert.escaping import code, markdown
from spmconvert.exporting.comparison import Comparison
from spmconvert.model.opening import opened_names
from spmconvert.version import __version__


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        bytes: of tensors, or of the files that hold them.
        comparison: with the converted model.
        added_biases: switches of the config that were turned on to hold biases that the conversion added.
        note: what a user has to know, in a sentence; empty for nothing.
    """

    bytes: int
    comparison: Comparison
    added_biases: tuple[str, ...] = ()
    note: str = ""


class Form(Protocol):
    """One format, for one converted checkpoint."""

    @property
    def needed_bytes(self) -> int:
        """Space that it takes."""
        ...

    def write(self, target: OutputDirectory) -> Written:
        """Write all files, and compare what they compute.

        Raises:
            FitError: when it is not the same.
        """
        ...


def refuse_opened(converted: Converted, why: str) -> None:
    """Refuse layers of experts and of recurrences, which only run in the modules that spmconvert opened for them.

    Raises:
        UnsupportedLayerError: when there is one.
    """
    opened = sorted(opened_names(converted.layers))
    if opened:
        more = f" and {len(opened) - 1} more" if len(opened) > 1 else ""
        raise UnsupportedLayerError(
            f"{opened[0]}{more}: experts or recurrences with converted layers, {why}; export with --format dense, which "
            "fuses them again, or load the checkpoint with import spmconvert"
        )


def add_companions(converted: Converted, target: OutputDirectory) -> None:
    """Tokenizer, processor, generation config and what else belongs to the model beside its weights."""
    for file in converted.checkpoint().companion_files():
        target.add_file(str(file.relative_to(converted.directory)), file)


def plain_config(converted: Converted) -> dict[str, Any]:
    """The config without the layer map."""
    return dense_config(converted.config)


def card(converted: Converted, title: str, text: str) -> str:
    """The model card of an export."""
    name = converted.directory.resolve().name
    by = f"Written by spmconvert {__version__} from the converted checkpoint {code(name)}"
    return f"# {markdown(name)}, {title}\n\n{by}: {text}\n"
