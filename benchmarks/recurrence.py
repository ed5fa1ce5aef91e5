"""What structured matrices cost and save in a recurrence: a character LSTM on Tiny Shakespeare, at several widths.

    python -m benchmarks.recurrence --text tinyshakespeare.txt

The net is trained here, on all but the last tenth of the text. Its input and recurrent matrices are then fitted as low
rank, as one pass of stages, and as stages beside low rank, on the states that it runs through, and nothing is trained
afterwards. The loss is in nats a character on the last tenth. Times are those of torch's own LSTM divided by those of the
opened one (above 1 is faster), in turn in one run, for one row and for sixteen; ``dense`` is the opened net as it was,
which shows what the loop over the steps costs by itself.
"""

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.common import save_json
from benchmarks.environment import environment
from spmconvert.calibrate.statistics import collect
from spmconvert.fit.solver import fit_
from spmconvert.model.opening import open_
from spmconvert.model.swap import replace_module
from spmconvert.operator.design import Design, staged_design
from spmconvert.operator.factors import rank_at
from spmconvert.operator.linear import SPMLinear
from spmconvert.system.timing import interleaved_seconds

BLOCK, BATCH = 64, 32
TIMED_TOKENS, TIMED_SECONDS = 128, 2.0
ROWS = (1, 16)


class CharacterNet(nn.Module):
    """Embedding, LSTM and head over characters."""

    def __init__(self, characters: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [rows, tokens] -> logits [rows, tokens, characters]."""
        logits: Tensor = self.head(self.lstm(self.embedding(ids))[0])
        return logits


def main() -> None:
    """Train, fit, measure, and print a line a structure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = options.text.read_text(encoding="utf-8")
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(character) for character in text])
    cut = int(0.9 * len(ids))
    result: dict[str, Any] = {"environment": environment("cpu", "float32", options.threads), "rows": []}
    for width in options.widths:
        net = trained(len(characters), width, ids[:cut], options.steps)
        for row in measured(net, width, ids[:cut], ids[cut:]):
            result["rows"].append(row)
            print(row, flush=True)
            if options.json:
                save_json(options.json, result)


def trained(characters: int, width: int, ids: Tensor, steps: int) -> CharacterNet:
    """A net after so many steps of AdamW."""
    torch.manual_seed(0)
    net = CharacterNet(characters, width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(len(ids) - BLOCK - 1, (BATCH,)).tolist()
        rows = torch.stack([ids[start : start + BLOCK + 1] for start in starts])
        loss = cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def designs(width: int) -> dict[str, Design]:
    """Designs of both matrices, [4 * width, width], by name."""
    sizes = (width, 4 * width)
    low = {
        f"low rank, {keep:.0%}": staged_design(*sizes, 0, "general", 1, rank_at(int(keep * 4 * width * width), *sizes))
        for keep in (0.25, 0.5)
    }
    stages = staged_design(*sizes, None, "general", 1, 0)
    left = rank_at(int(0.25 * 4 * width * width) - stages.parameter_count(bias=False), *sizes)
    return {**low, "one pass": stages, "one pass + low rank, 25%": staged_design(*sizes, None, "general", 1, left)}


def measured(net: CharacterNet, width: int, fitted: Tensor, held_out: Tensor) -> list[dict[str, Any]]:
    """Loss and times of every structure."""
    opened = copy.deepcopy(net)
    open_(opened)
    names = ["lstm.l0.input", "lstm.l0.recurrent"]
    batches = [{"ids": rows} for rows in fitted[: 256 * BLOCK].view(-1, 32, BLOCK).unbind(0)]
    moments = collect(opened, names, batches)
    nets: dict[str, nn.Module] = {"dense": opened}
    for title, design in designs(width).items():
        nets[title] = copy.deepcopy(opened)
        for name in names:
            dense: Any = opened.get_submodule(name)
            layer = SPMLinear(width, 4 * width, terms=design.terms)
            fit_(layer, dense.weight, dense.bias, moments[name])
            replace_module(nets[title], name, layer.eval().requires_grad_(False))
    found: list[dict[str, Any]] = []
    for title, one in {"torch's LSTM": net, **nets}.items():
        layers = [module for module in one.modules() if isinstance(module, SPMLinear)]
        kept = sum(layer.design.parameter_count(bias=False) for layer in layers) / (8 * width * width) if layers else 1.0
        times = {f"faster, {rows} rows": faster(net, one, rows) for rows in ROWS} if one is not net else {}
        found.append({"width": width, "structure": title, "kept": round(kept, 4), "loss": loss_of(one, held_out), **times})
    return found


@torch.no_grad()
def loss_of(net: nn.Module, ids: Tensor) -> float:
    """Nats a character."""
    rows = ids[: (len(ids) - 1) // 256 * 256]
    x, y = rows.view(-1, 256), ids[1 : len(rows) + 1].view(-1, 256)
    losses = [
        cross_entropy(net(a).flatten(0, 1), b.flatten()).item() for a, b in zip(x.split(64), y.split(64), strict=True)
    ]
    return round(statistics.mean(losses), 4)


def faster(dense: nn.Module, other: nn.Module, rows: int) -> float:
    """How many times as fast a net is."""
    ids = torch.zeros(rows, TIMED_TOKENS, dtype=torch.long)

    def call_of(net: nn.Module) -> Any:
        def call() -> Any:
            with torch.no_grad():
                return net(ids)

        return call

    times = interleaved_seconds({"dense": call_of(dense), "other": call_of(other)}, TIMED_SECONDS, "cpu")
    return round(statistics.median(times["dense"]) / statistics.median(times["other"]), 3)


if __name__ == "__main__":
    main()
