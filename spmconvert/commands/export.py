"""A converted checkpoint in a form that runs without spmconvert; what it computes is compared before it appears.

The formats are files of ``exporting``: ``dense`` matrices for any runtime, ``portable`` with the code of its layers beside
the weights, ``onnx`` and ``torch`` graphs.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spmconvert.checkpoint.converted import Converted, open_converted
from spmconvert.checkpoint.places import check_apart, check_output
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.errors import OptionError
from spmconvert.exporting.dense import Dense
from spmconvert.exporting.form import Form
from spmconvert.exporting.onnx import Onnx
from spmconvert.exporting.portable import Portable
from spmconvert.exporting.program import Program
from spmconvert.version import __version__

FORMATS: dict[str, Callable[[Converted], Form]] = {
    "dense": Dense,
    "portable": Portable,
    "onnx": Onnx,
    "torch": Program,
}


@dataclass(frozen=True)
class Export:
    """The result of ``export``.

    Attributes:
        output: the directory that was written.
        form: its format.
        layers: number of converted layers in it.
        bytes: bytes of its tensors, or of the files that hold them.
        added_biases: switches of the config that were turned on to hold biases that the conversion added.
        difference: largest difference of an output relative to the largest output, None where nothing was compared.
        tolerance: what that may be at most.
        compared: on what outputs were compared, or why not.
        note: what a user has to know, in a sentence; empty for nothing.
    """

    output: Path
    form: str
    layers: int
    bytes: int
    added_biases: tuple[str, ...]
    difference: float | None
    tolerance: float
    compared: str
    note: str = ""


def export(directory: str | Path, output: str | Path | None = None, *, form: str = "dense", force: bool = False) -> Export:
    """Write a converted checkpoint in another form.

    Args:
        directory: output of a conversion or of a finetune.
        output: directory to write; None for the same name with the format behind it.
        form: one of ``FORMATS``.
        force: replace an output that exists.

    Raises:
        OptionError: when the form is unknown, or the output is the converted checkpoint.
        UnsupportedLayerError: when a layer has no place in the form.
        BackendError: when a package is missing that writes or runs the form.
        FitError: when the result does not compute the same.
        SpmconvertError: as ``convert`` does for checkpoints and outputs.
    """
    if form not in FORMATS:
        raise OptionError(f"format is {form!r}; choose one of {', '.join(FORMATS)}")
    converted = open_converted(Path(directory), recorded=False)
    source = converted.provenance["source"]["name"] if converted.provenance else None
    destination = Path(output) if output else Path(f"{converted.directory.resolve().name}-{form}")
    # the source is not read, and yet it may be the only dense model there is
    check_apart(destination, {"input": converted.directory, "source": source})
    check_output(Path(os.path.realpath(destination)), force=force)
    prepared = FORMATS[form](converted)
    hashed = hashlib.sha256(f"{converted.checkpoint().sha256()} {form} {__version__}".encode()).hexdigest()
    with OutputDirectory(
        destination,
        fingerprint=hashed,
        force=force,
        resume=False,
        needed_bytes=prepared.needed_bytes,
        resumable=False,
    ) as target:
        written = prepared.write(target)
        target.commit()
    compared = written.comparison
    return Export(
        destination,
        form,
        len(converted.layers),
        written.bytes,
        written.added_biases,
        compared.difference,
        compared.tolerance,
        compared.what,
        written.note,
    )
