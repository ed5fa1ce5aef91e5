"""Whether a device that was asked for is there."""

import torch

from spmconvert.errors import BackendError, first_line


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        BackendError: when it cannot be used.
    """
    try:
        if torch.empty(1, device=device).is_meta:
            raise BackendError(f"device {device!r} has no memory, so nothing is computed there; use --device cpu")
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"device {device!r} cannot be used here ({first_line(error)}); use --device cpu") from None
