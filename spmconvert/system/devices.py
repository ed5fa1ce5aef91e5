"""Whether a device that was asked for is there."""

import torch

from spmconvert.errors import BackendError, first_line


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        BackendError: when it cannot be used.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise BackendError(f"device {device!r} is unknown; give cpu, cuda, or one of several such as cuda:1") from None
    if found.type == "meta":
        raise BackendError("device meta has no memory, so nothing is computed there; use --device cpu")
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BackendError(f"device {device!r} cannot be used here ({first_line(error)}); use --device cpu") from None
