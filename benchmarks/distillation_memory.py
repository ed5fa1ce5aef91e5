"""Peak memory of the KL over a vocabulary: in chunks of tokens from the hidden states, against the plain form.

    python -m benchmarks.distillation_memory --json results/distillation-memory.json

Each form runs forward and backward once in a process of its own; memory is the largest resident set beyond what the process
had with all inputs in place.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import save_json
from benchmarks.environment import environment
from spmconvert.outputs.losses import kl_divergence, over_chunks

FORMS = ("plain", "chunked")


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 50257, 128256])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--form", choices=FORMS, help="run one form in this process and print its figures")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.form:
        print(json.dumps(measure(options.form, options.features, options.vocabularies[0], options.tokens)))
        return
    rows = []
    for words in options.vocabularies:
        found = {form: in_own_process(form, words, options) for form in FORMS}
        ratio = found["plain"]["peak_bytes"] / found["chunked"]["peak_bytes"]
        rows.append({"vocabulary": words, "tokens": options.tokens, **found, "plain/chunked": ratio})
    table = Table("vocabulary", "tokens", "plain MB", "chunked MB", "plain/chunked", "relative difference of the gradient")
    for row in rows:
        sizes = [f"{row[form]['peak_bytes'] / 1e6:.0f}" for form in FORMS]
        difference = abs(row["plain"]["gradient"] / row["chunked"]["gradient"] - 1)
        table.add_row(
            str(row["vocabulary"]), str(row["tokens"]), *sizes, f"{row['plain/chunked']:.1f}", f"{difference:.1e}"
        )
    Console(width=120).print(table)
    save_json(
        options.json,
        {"environment": environment("cpu", "float32", torch.get_num_threads()), "features": options.features, "rows": rows},
    )


def in_own_process(form: str, words: int, options: argparse.Namespace) -> dict[str, float]:
    """The figures of one form."""
    command = [sys.executable, "-m", "benchmarks.distillation_memory", "--form", form, "--vocabularies", str(words)]
    command += ["--features", str(options.features), "--tokens", str(options.tokens)]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def measure(form: str, features: int, words: int, tokens: int) -> dict[str, float]:
    """Peak bytes beyond the inputs, and the size of the gradient."""
    torch.manual_seed(0)
    heads = [torch.nn.Linear(features, words, bias=False) for _ in range(2)]
    states, target = torch.randn(tokens, features, requires_grad=True), torch.randn(tokens, features)
    # the gradients of the heads are inputs too: both forms have them
    for head in heads:
        head.weight.grad = torch.zeros_like(head.weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def loss(own: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher = heads[1](wanted)
        return kl_divergence(heads[0](own), teacher, 1.0)

    total = loss(states, target) if form == "plain" else over_chunks(loss, states, target)
    total.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": 1024.0 * (peak - before), "gradient": states.grad.norm().item()}


if __name__ == "__main__":
    main()
