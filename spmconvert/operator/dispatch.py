"""Which implementation of the operator runs: one function decides, and a backend that cannot run is an error.

``auto`` takes the fastest implementation that is known to work where the input lives. The others are chosen by name;
nothing is ever replaced by something else silently.
"""

from typing import Literal, get_args

from spmconvert.errors import BackendError, OptionError

Backend = Literal["auto", "reference", "merged", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


# below this many tokens merging costs more than it saves, where it has to be done for every step: forward and backward of
# 16 tokens take 2.3 ms by the reference and 3.1 merged at width 768, 64 tokens 3.9 and 3.6 (two CPU cores)
FEW_TOKENS = 32


def resolve_backend(requested: Backend, device_type: str, *, tokens: int | None = None) -> Backend:
    """Name the implementation that will run.

    Args:
        requested: one of ``BACKENDS``.
        device_type: ``torch.device.type`` of the input.
        tokens: tokens of a training step, which has to merge anew; None where merged blocks can be kept.

    Raises:
        OptionError: when the name is unknown.
        BackendError: when the backend cannot run on that device.
    """
    if requested not in BACKENDS:
        raise OptionError(f"backend is {requested!r}; choose one of {', '.join(BACKENDS)}")
    if requested == "triton":
        raise BackendError(
            f"backend triton has no kernels for {device_type} in this version; use auto, merged or reference"
        )
    if requested != "auto":
        return requested
    return "reference" if tokens is not None and tokens < FEW_TOKENS and device_type == "cpu" else "merged"
