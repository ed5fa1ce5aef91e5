"""Times of calls that are made in turn within one run, so that a disturbed machine disturbs all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FEWEST_ROUNDS = 5
MOST_ROUNDS = 200


def interleaved_seconds(
    calls: Mapping[str, Callable[[], Any]], seconds: float, device: str, *, fewest: int = FEWEST_ROUNDS
) -> dict[str, list[float]]:
    """Time calls in turn, each once a round, in an order that rotates.

    Args:
        calls: what to time, by name.
        seconds: about how long the whole of it may take; it ends after that or ``MOST_ROUNDS``.
        device: where the calls compute; an accelerator is waited for.
        fewest: rounds that are made however long they take.

    Returns:
        Seconds of every call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for name in names:
        calls[name]()
    _wait(device)
    began = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            calls[name]()
            _wait(device)
            times[name].append(time.perf_counter() - start)
        if turn + 1 >= fewest and time.perf_counter() - began >= seconds:
            break
    return times


def compared_seconds(times: Mapping[str, list[float]]) -> dict[str, float]:
    """One time for each of the calls: the first one's median, and the others' as they compare with it.

    A call's time is divided by the first one's of the same round, and the median of that is taken. Where passes take longer
    or shorter by a fifth than the one before, as on shared machines they do, medians of 15 rounds are compared to 4.5 % and
    rounds to 2 %.
    """
    (first, base), *others = times.items()
    seconds = statistics.median(base)
    ratios = {name: statistics.median(b / a for a, b in zip(base, own, strict=True)) for name, own in others}
    return {first: seconds, **{name: seconds * ratio for name, ratio in ratios.items()}}


def device_name(device: str) -> str:
    """What computes there: the processor with its number of threads, or the accelerator."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            found = next((line for line in lines if line.startswith("model name")), "")
    except OSError:
        found = ""
    return found.partition(":")[2].strip() or "cpu"


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
