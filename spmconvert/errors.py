"""Every error the tool raises on purpose, with its exit code.

    SpmconvertError                1   base class: catch this one to catch them all
    ├── OptionError                2   an option is malformed, or two options contradict each other
    ├── RecipeError                3   a recipe does not parse, or has an unknown key
    ├── ModelNotFoundError         4   neither a directory nor a reachable hub id
    ├── CheckpointError            5   the directory is not a checkpoint that can be read
    │   └── CorruptCheckpointError 6   truncated, overlapping, escaping, missing or non-finite tensors
    ├── TargetError                7   no layer matched, or a named layer may not be touched
    │   └── UnsupportedLayerError  8   a named layer has a form that cannot be converted
    ├── CalibrationError           9   the calibration or training text is empty, too short or unreadable
    ├── OutputError               10   the output exists, or nothing there can be resumed
    │   ├── SpaceError            11   not enough free space
    │   ├── NotWritableError      12   no permission to write
    │   └── LockedError           13   another run holds the output
    ├── BackendError              14   a device or backend was asked for that cannot run here
    ├── FitError                  15   a fit or an export produced a layer that must not be saved
    └── VerificationError         16   a converted checkpoint failed a check of ``verify``

An interrupted run (Ctrl-C) exits with 130. Each message is one line: what was found, the limit, the remedy.
"""

from typing import ClassVar, Self

INTERRUPTED_EXIT_CODE = 130
NEEDS_CODE = "it needs code of its own, which is never run"


def first_line(error: BaseException) -> str:
    """What a library's error says, for a message of one line; a demand for ``trust_remote_code`` is named as what it is."""
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text:
        return NEEDS_CODE
    first, *others = [line.strip() for line in text.splitlines()]
    # what a colon announces is in the next line
    return f"{first} {others[0]}" if first.endswith(":") and others else first


class SpmconvertError(Exception):
    """Base of all errors raised on purpose."""

    exit_code: ClassVar[int] = 1


class OptionError(SpmconvertError, ValueError):
    """An option is malformed, or two options contradict each other."""

    exit_code = 2


class OutOfReachError(OptionError):
    """No designs make the model as much faster as it is to be."""


class RecipeError(SpmconvertError, ValueError):
    """A recipe does not parse, has an unknown key, or a value outside its range."""

    exit_code = 3


class ModelNotFoundError(SpmconvertError):
    """The model is neither a local directory nor a hub id that can be reached."""

    exit_code = 4


class CheckpointError(SpmconvertError):
    """The directory is not a checkpoint this tool reads."""

    exit_code = 5


class CorruptCheckpointError(CheckpointError):
    """A checkpoint file contradicts itself: truncated, overlapping, escaping, missing or non-finite tensors."""

    exit_code = 6


class TargetError(SpmconvertError):
    """No layer matched, or a layer was named that must not be converted."""

    exit_code = 7


class UnsupportedLayerError(TargetError):
    """A named layer has a form that cannot be converted."""

    exit_code = 8


class CalibrationError(SpmconvertError):
    """The calibration or training text is missing, empty, too short or cannot be decoded, or does not suit the model."""

    exit_code = 9

    @classmethod
    def not_finite(cls, found: str, layer: str) -> Self:
        """The error for values that overflowed, named ``found``, at a layer."""
        return cls(
            f"{found} are not finite on the calibration rows; leave the layer out with --ignore {layer}, or use --device "
            "cpu, where products are float32"
        )


class OutputError(SpmconvertError):
    """The output directory exists already, or holds nothing that can be resumed."""

    exit_code = 10


class SpaceError(OutputError):
    """There is less free space than the output needs."""

    exit_code = 11


class NotWritableError(OutputError):
    """The output may not be written."""

    exit_code = 12


class LockedError(OutputError):
    """Another run is writing to the same output."""

    exit_code = 13


class BackendError(SpmconvertError, RuntimeError):
    """A device or an operator backend was asked for that cannot run here."""

    exit_code = 14


class FitError(SpmconvertError):
    """A fit or an export produced a layer that must not be saved."""

    exit_code = 15


class VerificationError(SpmconvertError):
    """A converted checkpoint failed a check of ``verify``."""

    exit_code = 16
