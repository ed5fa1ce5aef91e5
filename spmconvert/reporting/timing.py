"""Latency and memory: dense and converted in turn within one run, so that a disturbed machine disturbs both.

Reported are percentiles, not the best. Peak memory is that of a fresh process which loads one model and
runs it once, because a process that has run another model has no memory of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spmconvert.data.rows import Row, row_batch
from spmconvert.errors import SpmconvertError
from spmconvert.model.stacked_experts import is_converted
from spmconvert.outputs.probe import token_batch
from spmconvert.reporting.schema import Latency, NotMeasured, Quantity, TimingRow
from spmconvert.system.fresh import run_fresh
from spmconvert.system.timing import interleaved_seconds

TOKENS = (1, 16, 128, 1024)
# pictures or sounds
ITEMS = (1, 8)
# tokens of the passes that compare methods and measure memory
TYPICAL_TOKENS = 128
MEMORY_TOKENS = 1024
PROMPT_TOKENS = 16
NEW_TOKENS = 32


def interleaved(calls: Mapping[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, Latency]:
    """Time calls in turn.

    Args:
        calls: what to time, by name.
        seconds: about how long the whole of it may take.
        device: where the calls compute; an accelerator is waited for.

    Returns:
        Percentiles in milliseconds, by name.
    """
    times = interleaved_seconds(calls, seconds, device)
    return {name: _latency([1000 * value for value in values]) for name, values in times.items()}


def time_forward(dense: Any, converted: Any, seconds: float, device: str, sizes: Sequence[int] = TOKENS) -> list[TimingRow]:
    """Whole-model forward passes by number of tokens."""
    batches = [(tokens, token_batch(dense, tokens)) for tokens in sizes]
    return [_timed(dense, converted, batch, tokens, seconds, device) for tokens, batch in batches]


def time_items(
    dense: Any, converted: Any, seconds: float, device: str, rows: Sequence[Row], sizes: Sequence[int] = ITEMS
) -> list[TimingRow]:
    """Whole-model forward passes by number of pictures or sounds, told in tokens: what a replaced layer gets of them."""
    batches = [row_batch(rows[:count], 0, dense) for count in sizes if count <= len(rows)]
    return [_timed(dense, converted, batch, _most_positions(converted, batch), seconds, device) for batch in batches]


def _timed(dense: Any, converted: Any, batch: dict[str, Any], tokens: int, seconds: float, device: str) -> TimingRow:
    calls = {"dense": forward_call(dense, batch), "converted": forward_call(converted, batch)}
    latency = interleaved(calls, seconds, device)
    shape = " x ".join(map(str, batch[dense.main_input_name].shape))
    return TimingRow(what="forward", tokens=tokens, shape=shape, **latency)


def _most_positions(converted: Any, batch: dict[str, Any]) -> int:
    """The most rows that a replaced layer gets in one pass."""
    most = 0

    def note(layer: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal most
        most = max(most, arguments[0].numel() // layer.in_features)

    layers = [module for module in converted.modules() if is_converted(module)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        forward_call(converted, batch)()
    finally:
        for hook in hooks:
            hook.remove()
    return most


def forward_call(model: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    """A forward pass without gradients, ready to be timed."""

    def call() -> Any:
        with torch.no_grad():
            return model(**batch)

    return call


def generate(model: Any, ids: torch.Tensor, new_tokens: int, **beside: torch.Tensor) -> torch.Tensor:
    """Greedy continuation of ids [rows, tokens] by exactly so many tokens; [rows, tokens].

    ``beside`` is what the model is given with them, such as pictures; its mask of attention, too.
    """
    padding = model.generation_config.pad_token_id
    with torch.no_grad():
        return model.generate(
            input_ids=ids,
            **{"attention_mask": torch.ones_like(ids), **beside},
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0 if padding is None else padding,
        )


def time_generation(dense: Any, converted: Any, seconds: float, device: str) -> TimingRow:
    """Greedy generation after a short prompt."""
    ids = token_batch(dense, PROMPT_TOKENS)["input_ids"][:1]
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: generate(dense, ids, NEW_TOKENS),
        "converted": lambda: generate(converted, ids, NEW_TOKENS),
    }
    latency = interleaved(calls, seconds, device)
    shape = f"prompt of {ids.shape[1]}, {NEW_TOKENS} new"
    return TimingRow(what="generate", tokens=NEW_TOKENS, shape=shape, **latency)


def peak_memory(dense: Path, converted: Path, device: str) -> Quantity | NotMeasured:
    """Peak memory of loading a model and running one pass, each in a fresh process."""
    try:
        used = [run_fresh("spmconvert.reporting.timing:memory_of", str(path), device) for path in (dense, converted)]
    except SpmconvertError as error:
        return NotMeasured(what="peak memory", reason=str(error), remedy="run the report on Linux with free memory")
    return Quantity(
        what="peak memory",
        unit="B",
        scope="whole model",
        dense=used[0],
        converted=used[1],
        note=f"of a fresh process that loads the model on {device} and runs {MEMORY_TOKENS} tokens, above its libraries",
    )


def memory_of(directory: str, device: str) -> int:
    """Load a checkpoint in this process, run it once, and return the bytes it needed beyond the libraries."""
    from spmconvert.model.loading import load

    before = 0 if device.startswith("cuda") else _resident("VmRSS")
    model = load(directory, dtype="auto").to(device).eval()
    forward_call(model, token_batch(model, MEMORY_TOKENS))()
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A memory figure of this process; unlike getrusage's it is not inherited from the parent."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise SpmconvertError(f"/proc/self/status has no {field}")


def _latency(values: list[float]) -> Latency:
    p20, p50, p80 = (float(value) for value in np.percentile(values, [20, 50, 80]))
    return Latency(p20=p20, p50=p50, p80=p80, samples=len(values))
