"""Which implementation of the operator runs: one function decides, and a backend that cannot run is an error.

``auto`` takes the fastest implementation that is known to work where the input lives. The others are chosen by name;
nothing is ever replaced by something else silently.
"""

from typing import Literal, get_args

from spmconvert.errors import BackendError, OptionError

Backend = Literal["auto", "reference", "merged", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def resolve_backend(requested: Backend, device_type: str) -> Backend:
    """Name the implementation that will run.

    Args:
        requested: one of ``BACKENDS``.
        device_type: ``torch.device.type`` of the input.

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
    return "merged" if requested == "auto" else requested
