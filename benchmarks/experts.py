"""What half of the parameters of all experts cost a small mixture: the tool's budgets beside uniform whitened SVD.

    python -m benchmarks.teacher --architecture mixture --text wikitext-2-valid.txt --output teachers/mixture
    python -m benchmarks.experts --model teachers/mixture --calibration wikitext-2-valid.txt --evaluate wikitext-2-test.txt

Uniform whitened SVD gives every expert and projection the same share of its parameters, whatever it is worth, on its own
tokens. ``--keep`` chooses one design a projection of a layer by what its errors cost the model. Each is shown as it was
fitted and with the blocks refined alike. Scores are cross-entropy in nats a token on the other text, and the divergence
from the dense model there. How uneven routing is stands above: the tokens of the expert that gets fewest and most, as
shares of an even one.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch

import spmconvert
from benchmarks.common import save_json
from benchmarks.environment import environment
from benchmarks.scores import language_score
from spmconvert.data.calibration import load_rows
from spmconvert.fit.refine import REFINEMENT_EPOCHS
from spmconvert.model.architecture import load_config
from spmconvert.model.experts import OpenedExperts
from spmconvert.model.loading import load
from spmconvert.model.opening import open_
from spmconvert.recipe.recipe import Calibration

EXPERTS = "*.experts.*"


def main() -> None:
    """Measure, print a line a method, and write the JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    dense = load(options.model, dtype=torch.float32).eval().requires_grad_(False)
    score = language_score(options.model, dense, options.evaluate, options.evaluation_rows)
    result: dict[str, Any] = {
        "environment": environment("cpu", "float32", options.threads),
        "settings": {key: str(value) for key, value in vars(options).items() if key != "json"},
        "routing": routing(options),
        "dense": score(dense),
        "rows": [],
    }
    print(result["routing"], result["dense"], flush=True)
    parameters = expert_parameters(dense)
    for keep in options.keep:
        for name, changes in methods(dense, keep).items():
            for epochs in (0, REFINEMENT_EPOCHS):
                scores = converted(options, score, changes, epochs, parameters)
                row = {"method": name, "keep": keep, "epochs": epochs, **scores}
                result["rows"].append(row)
                print(row, flush=True)
                if options.json:
                    save_json(options.json, result)


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of the mixture")
    parser.add_argument("--calibration", type=Path, required=True, help="text to fit on")
    parser.add_argument("--evaluate", type=Path, required=True, help="another text, only measured")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--calibration-rows", type=int, default=256)
    parser.add_argument("--evaluation-rows", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def methods(dense: Any, keep: float) -> dict[str, dict[str, Any]]:
    """Recipe changes by method."""
    budget = {"keep": keep, "allow_slower": True}
    overrides = []
    opened = opened_experts(dense)[0]
    for projection in ("gate_up", "down"):
        layer = opened.experts[0].get_submodule(projection)
        rank = int(keep * layer.weight.numel() / sum(layer.weight.shape))
        overrides.append({"pattern": f"*.{projection}", "terms": [{"kind": "lowrank", "rank": rank}]})
    return {
        "uniform whitened SVD": {"overrides": overrides, "output_weighting": False},
        "keep, low rank": {**budget, "structures": "lowrank"},
        "keep": budget,
    }


def opened_experts(dense: Any) -> list[OpenedExperts]:
    """The experts of all blocks, opened on a copy of a model."""
    opened = copy.deepcopy(dense)
    open_(opened)
    return [module for module in opened.modules() if isinstance(module, OpenedExperts)]


def converted(
    options: argparse.Namespace, score: Any, changes: dict[str, Any], epochs: int, parameters: int
) -> dict[str, Any]:
    """The scores of a conversion, and the share of the experts' parameters that it keeps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "o"
        rows = {"calib": options.calibration, "calibration.rows": options.calibration_rows, "refine": epochs}
        conversion = spmconvert.convert(options.model, out, targets=EXPERTS, **rows, **changes)
        model = load(out, dtype=torch.float32).eval()
        saved = sum(record.dense_parameters - record.parameters for record in conversion.layers)
        return {"kept": 1 - saved / parameters, "left_dense": conversion.left_dense, **score(model)}


def expert_parameters(dense: Any) -> int:
    """Parameters of all experts' matrices, those of blocks that a budget leaves alone too."""
    experts = (expert for module in opened_experts(dense) for expert in module.experts)
    return sum(layer.weight.numel() for expert in experts for layer in expert.children())


def routing(options: argparse.Namespace) -> dict[str, float]:
    """Tokens of the experts that get fewest and most, as shares of an even one, over all layers."""
    model = load(options.model, dtype=torch.float32).eval()
    open_(model)
    calibration = Calibration(file=options.calibration, rows=options.calibration_rows)
    rows = load_rows(options.model, load_config(options.model), calibration, seed=0)
    shares = []
    for module in (module for module in model.modules() if isinstance(module, OpenedExperts)):
        counts = torch.zeros(len(module.experts))

        def count(_: torch.nn.Module, given: tuple[torch.Tensor, ...], counts: torch.Tensor = counts) -> None:
            counts += given[1].reshape(-1).bincount(minlength=len(counts))

        module.register_forward_pre_hook(count)
        shares.append(counts)
    with torch.no_grad():
        for batch in rows.batches(rows.fitted, model):
            model(**batch)
    even = [counts / counts.mean() for counts in shares]
    return {"fewest": min(one.min().item() for one in even), "most": max(one.max().item() for one in even)}


if __name__ == "__main__":
    main()
