"""Which implementation of the operator runs: one function decides, and a backend that cannot run is an error.

``auto`` takes what was measured to be the fastest on a CPU; ``_choose`` holds that choice and nothing else does. On CUDA
nothing has been timed, and ``auto`` is the merged form, which is plain PyTorch: the Triton kernels have been compiled and
their results checked, no more, so they run only where they are asked for by name. Nothing is ever replaced by something
else silently.
"""

import os
from importlib.util import find_spec
from typing import Literal, get_args

from spmconvert.errors import BackendError, OptionError

Backend = Literal["auto", "reference", "merged", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
HAS_TRITON = find_spec("triton") is not None

# below this many tokens merging costs more than it saves, where it has to be done for every step: at width 768 the merged
# form overtakes the reference between 16 and 64 tokens, see benchmarks/results/operator-cpu-2026-11-29.json
FEW_TOKENS = 32


def resolve_backend(requested: Backend, device_type: str, *, tokens: int | None = None) -> Backend:
    """Name the implementation that will run.

    Args:
        requested: one of ``BACKENDS``.
        device_type: ``torch.device.type`` of the input.
        tokens: tokens of a step that trains the stages and so has to merge anew; None for any other call.

    Raises:
        OptionError: when the name is unknown.
        BackendError: when the backend cannot run on that device.
    """
    if requested not in BACKENDS:
        raise OptionError(f"backend is {requested!r}; choose one of {', '.join(BACKENDS)}")
    if requested == "triton":
        _require_triton(device_type)
    return _choose(device_type, tokens) if requested == "auto" else requested


def _choose(device_type: str, tokens: int | None) -> Backend:
    """What ``auto`` is; ``benchmarks/operator.py`` measures it."""
    return "reference" if tokens is not None and tokens < FEW_TOKENS and device_type == "cpu" else "merged"


def _require_triton(device_type: str) -> None:
    if device_type != "cuda" and not interprets_triton():
        raise BackendError(f"backend triton runs on cuda, the input is on {device_type}; use auto, merged or reference")
    if not HAS_TRITON:
        raise BackendError("backend triton needs the package triton; install triton>=3.7, or use auto, merged or reference")


def interprets_triton() -> bool:
    """Whether Triton's interpreter stands in for a GPU, as its own variable says; it runs kernels on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"
