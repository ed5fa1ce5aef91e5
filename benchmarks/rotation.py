"""Timing one layer without help from the cache: several copies, each with inputs of its own, run in turn.

The copies of an implementation together take at least twice the device's last cache, up to ``MOST_COPIES`` of them; the
result says how many bytes they took, so that a layer too small to leave the cache can be told. Small numbers of tokens are
replayed as a CUDA graph of one round, because launching from Python takes longer than they do; everything else is
launched as it would be in a model. Rounds of all implementations take turns, so that noise hits them alike.

Beside a time stand the bytes the pass cannot avoid (inputs, outputs and weights once, see ``floor_bytes``) divided by it,
and the share that the time of a device copy of as many bytes, measured in the same run, has of it.
"""

import time
from collections.abc import Callable

import torch

from benchmarks.environment import synchronize
from spmconvert.operator.linear import SPMLinear
from spmconvert.operator.merged import merge_stages

MOST_COPIES = 64
FEWEST_SAMPLES = 3
MOST_SAMPLES = 200
# forward passes of up to this many tokens are replayed from a graph
GRAPH_TOKENS = 256
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 25}
PERCENTILES = (20, 50, 80)


def build(name: str, shape: tuple[int, int], place: dict[str, object]) -> torch.nn.Module:
    """A layer of an implementation: ``dense``, or a backend of SPMLinear."""
    return torch.nn.Linear(*shape, **place) if name == "dense" else SPMLinear(*shape, backend=name, **place)


def floor_bytes(layer: torch.nn.Module, shape: tuple[int, int], tokens: int, itemsize: int, backward: bool) -> int:
    """Bytes a pass cannot avoid.

    Forward reads the input and the weights (for SPM the merged blocks, which inference keeps) and writes the output.
    With the backward the input and the parameters are read twice, the output's gradient once, and both gradients written.
    """
    parameters = sum(p.numel() for p in layer.parameters())
    if backward:
        return itemsize * (tokens * (3 * shape[0] + 2 * shape[1]) + 3 * parameters)
    if isinstance(layer, SPMLinear):
        stages = layer.spm
        blocks = merge_stages(stages.weight, stages.scale_in, stages.scale_out, stages.plan)
        parameters = sum(block.numel() for block in blocks) + shape[1]
    return itemsize * (tokens * sum(shape) + parameters)


def measure_rotated(
    names: list[str],
    shape: tuple[int, int],
    tokens: int,
    *,
    backward: bool,
    device: str,
    dtype: torch.dtype,
    seconds: float,
    bandwidth: float,
) -> dict[str, object]:
    """One line of the table: milliseconds a call of every implementation, bytes a second, and ratios of the medians."""
    place = {"device": device, "dtype": dtype}
    graph = device.startswith("cuda") and not backward and tokens <= GRAPH_TOKENS
    floors, copies, rounds = {}, {}, {}
    for name in names:
        first = build(name, shape, place)
        floors[name] = floor_bytes(first, shape, tokens, dtype.itemsize, backward)
        copies[name] = max(2, min(MOST_COPIES, -(-2 * cache_bytes(device) // floors[name])))
        layers = [first, *(build(name, shape, place) for _ in range(copies[name] - 1))]
        calls = [call(layer, tokens, shape, backward, place) for layer in layers]
        rounds[name] = captured(calls) if graph else in_turn(calls)
    times = sample(rounds, seconds, device)
    row: dict[str, object] = {
        "in_features": shape[0],
        "out_features": shape[1],
        "tokens": tokens,
        "pass": "forward+backward" if backward else "forward",
        "unit": "ms",
        "launch": "graph" if graph else "eager",
    }
    for name in names:
        values = torch.tensor(times[name]) / copies[name]
        figures = {f"p{p}": values.quantile(p / 100).item() for p in PERCENTILES}
        achieved = floors[name] / figures["p50"] * 1e3
        row[name] = {
            **figures,
            "samples": len(values),
            "copies": copies[name],
            "bytes_of_all_copies": copies[name] * floors[name],
            "floor_bytes": floors[name],
            "GB/s": achieved / 1e9,
            "share_of_floor": achieved / bandwidth,
        }
    for name in names[1:]:
        row[f"{names[0]}/{name}"] = row[names[0]]["p50"] / row[name]["p50"]
    return row


def call(
    layer: torch.nn.Module, tokens: int, shape: tuple[int, int], backward: bool, place: dict[str, object]
) -> Callable[[], None]:
    """A function that runs a layer once on an input of its own."""
    x = torch.randn(tokens, shape[0], **place)
    if not backward:
        layer.eval().requires_grad_(False)
        return lambda: layer(x)
    grad = torch.randn(tokens, shape[1], **place)
    x.requires_grad_()

    def both() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(grad)

    return both


def in_turn(calls: list[Callable[[], None]]) -> Callable[[], None]:
    """One round over all copies, run once before so that nothing is compiled or merged while it is timed."""

    def one_round() -> None:
        for run in calls:
            run()

    one_round()
    return one_round


def captured(calls: list[Callable[[], None]]) -> Callable[[], None]:
    """The same as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        one_round = in_turn(calls)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_round()
    return graph.replay


def sample(rounds: dict[str, Callable[[], None]], seconds: float, device: str) -> dict[str, list[float]]:
    """Milliseconds of rounds of all implementations, taking turns until the time is over."""
    times: dict[str, list[float]] = {name: [] for name in rounds}
    end = time.perf_counter() + seconds
    done = 0
    while done < FEWEST_SAMPLES or (time.perf_counter() < end and done < MOST_SAMPLES):
        for name, run in rounds.items():
            times[name].append(timed(run, device))
        done += 1
    return times


def timed(run: Callable[[], None], device: str) -> float:
    """Milliseconds of one run, on the device's own clock where it has one."""
    if not device.startswith("cuda"):
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    began.record()
    run()
    ended.record()
    synchronize(device)
    return began.elapsed_time(ended)


def cache_bytes(device: str) -> int:
    """Size of the last cache of a CUDA device; elsewhere none is asked for, and two copies take turns."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.startswith("cuda") else 0


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a large copy reads and writes, median of ten."""
    source = torch.ones(COPY_BYTES[device.partition(":")[0]], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = sorted(timed(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.numel() / times[5] * 1e3
