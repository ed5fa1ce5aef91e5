"""Whether a device that was asked for is there, and what it multiplies natively."""

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


def multiplies_bfloat16(device: str | torch.device) -> bool:
    """Whether products of bfloat16 are faster on a device than those of float32, for having instructions of their own.

    Where they are emulated they cost digits and time: on a CPU that has AVX-512 alone about twice that of float32.
    """
    found = torch.device(device)
    if found.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return found.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
