"""Which tile a kernel runs with: the fastest of a few, timed at first use, remembered in memory and on disk.

A choice is made for a device, a kernel, its constants (the shapes of the passes among them), a dtype and a range of
numbers of tokens (``token_range``). All candidates are in ``tiles``; timing, with the last cache emptied before every
run, is Triton's ``do_bench``. Nothing is timed at import, and nothing while a CUDA graph is captured: then a choice that
is known already holds, and the first candidate otherwise, which is not remembered. Several processes may tune at once:
files appear by renaming, and are named by the hash of all that a choice depends on.

``triton.autotune`` does not fit: buffers and grid follow from the tile, so it has to be known before the launch; the
range of tokens would have to be an argument of the kernel; it times inside a capture, where waiting for the device is an
error; and its files, which do not know the device's name, cannot hold constants that are tuples.

What it gives up: candidates round differently, so two machines, or two caches, may differ in the last bits. On one
machine the file keeps the choice. The first call at a new shape compiles and times every candidate.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spmconvert.errors import BackendError
from spmconvert.operator.dispatch import interprets_triton
from spmconvert.operator.triton import tiles
from spmconvert.operator.triton.tiles import Pass, Tiles
from spmconvert.system.caches import cache_directory
from spmconvert.system.files import write_whole
from spmconvert.system.parsing import parse_json

# milliseconds for which a candidate runs before and while it is timed
WARMUP, REPETITION = 5, 20
# from here on a launch has more tiles of tokens than a device runs at once, and more of them change nothing
MOST_TOKENS = 16384
_chosen: dict[tuple[Any, ...], Tiles] = {}


class Device(NamedTuple):
    """What a choice depends on of a device.

    Attributes:
        name: as the driver gives it.
        multiprocessors: number of them.
        shared_memory: most bytes of shared memory that one program may have.
    """

    name: str
    multiprocessors: int
    shared_memory: int


def choose(
    kernel: str, passes: tuple[Pass, ...], x: Tensor, constants: dict[str, Any], run: Callable[[Tiles], Any]
) -> Tiles:
    """The tiles of a launch, one for each of its passes.

    Args:
        kernel: ``mix``, ``fused``, ``few`` or ``gradient``.
        passes: what the launch computes.
        x: its input, [tokens, features].
        constants: the kernel's constants but for the tiles.
        run: launches with the tiles it is given, as often as it is asked to.

    Raises:
        BackendError: when no candidate runs on the device.
    """
    if not _can_time(x):
        return tiles.candidates(kernel, passes, x.element_size())[0]
    problem = (kernel, x.dtype, token_range(x.shape[0]), *constants.items())
    if (x.device, problem) not in _chosen:
        device = _describe(x.device)
        options = tiles.candidates(kernel, passes, x.element_size(), device.shared_memory)
        file = _file(device, problem, options)
        times = _read(file, len(options)) if len(options) > 1 else [0.0]
        if times is None:
            if _captures(x.device):
                return options[0]
            times = [_milliseconds(x.device, partial(run, option)) for option in options]
            if min(times) == math.inf:
                raise BackendError(f"kernel {kernel} has no tile that runs on {device.name}; use merged or reference")
            _write(file, options, times)
        _chosen[x.device, problem] = options[times.index(min(times))]
    return _chosen[x.device, problem]


def token_range(tokens: int) -> int:
    """The largest number of tokens that shares its choice with this one: a power of four."""
    return min(MOST_TOKENS, 4 ** (((tokens - 1).bit_length() + 1) // 2))


def _can_time(x: Tensor) -> bool:
    # the interpreter's time says nothing about a GPU
    return x.device.type == "cuda" and not interprets_triton()


def _captures(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@cache
def _describe(device: torch.device) -> Device:
    from triton.runtime import driver

    properties = torch.cuda.get_device_properties(device)
    limits = driver.active.utils.get_device_properties(device.index)
    return Device(properties.name, properties.multi_processor_count, limits["max_shared_mem"])


def _milliseconds(device: torch.device, run: Callable[[], Any]) -> float:
    """Median time of a launch; infinite where the compiler or the device has no room for it."""
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        with torch.cuda.device(device):
            return do_bench(run, warmup=WARMUP, rep=REPETITION, return_mode="median")
    except (OutOfResources, PTXASError):
        return math.inf


def _file(device: Device, problem: tuple[Any, ...], options: list[Tiles]) -> Path:
    import triton

    key = repr((triton.__version__, torch.__version__, _source_hash(), device, problem, options))
    return cache_directory("tiles") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


@cache
def _source_hash() -> str:
    return hashlib.sha256(Path(__file__).with_name("kernels.py").read_bytes()).hexdigest()


def _read(file: Path, count: int) -> list[float] | None:
    """Milliseconds of the candidates, or None where they have to be timed: there is no file, or none that can be read."""
    try:
        times: list[float] = parse_json(file.read_text(encoding="utf-8"))["milliseconds"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    whole = isinstance(times, list) and len(times) == count and all(isinstance(time, float) for time in times)
    return times if whole and min(times) < math.inf else None


def _write(file: Path, options: list[Tiles], times: list[float]) -> None:
    found = {"tiles": options, "milliseconds": times}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(found))
    except OSError as error:
        warnings.warn(
            f"the tuned tile could not be kept ({error}) and will be timed again by the next process; "
            "set SPMCONVERT_CACHE to a directory that can be written",
            stacklevel=2,
        )
