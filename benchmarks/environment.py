"""Where and with what figures were made: every result file carries it."""

from datetime import date
from pathlib import Path

import torch


def environment(device: str, dtype: str, threads: int) -> dict[str, object]:
    """Device, threads, dtype, version of torch and date."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()
    return {
        "device": name,
        "threads": threads,
        "dtype": dtype,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def cpu_name() -> str:
    """Name of the CPU, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def synchronize(device: str) -> None:
    """Wait for a CUDA device; nothing to wait for elsewhere."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
