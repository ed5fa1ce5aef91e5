"""Peak memory of a conversion by the size of the checkpoint: random Llama models that differ in their number of blocks.

    python -m benchmarks.conversion_memory --json benchmarks/results/conversion-memory.json --plot memory.png

Each checkpoint is written a block at a time and converted in a process of its own, ``--keep 0.5`` of every down projection,
outputs weighted by the model's own curvature, blocks refined. Memory is what the process itself has allocated, and what it
has with the pages of files that are mapped, which the system takes back where it is short of memory.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.common import save_json
from benchmarks.environment import environment

HIDDEN, INTERMEDIATE, HEADS, WORDS = 2048, 1024, 16, 8192
BLOCKS = "4,9,42"
OPTIONS = [
    "--targets=*.mlp.down_proj", "--keep=0.5", "--allow-slower", "--refine=1", "--set", "structures=lowrank",
    "--set", "calibration.rows=16", "--set", "calibration.tokens=128", "--no-measure",
]  # fmt: skip
SAMPLE_SECONDS = 0.05


def main() -> None:
    """Convert, print the table, write the JSON and draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", default=BLOCKS, help="numbers of blocks, comma-separated")
    parser.add_argument("--work", type=Path, default=Path("build/memory"), help="folder for checkpoints")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = []
    for blocks in map(int, options.blocks.split(",")):
        directory = options.work / f"llama-{blocks}"
        write_checkpoint(directory, blocks)
        text = options.work / "text.txt"
        text.write_text(made_up_text(), encoding="utf-8")
        rows.append({"blocks": blocks, "bytes": stored(directory), **converted(directory, text)})
        show(rows)
    save_json(options.json, {"environment": environment("cpu", "float32", torch.get_num_threads()), "rows": rows})
    if options.plot:
        draw(rows, options.plot)


def write_checkpoint(directory: Path, blocks: int) -> None:
    """A random model in float32, a block a file, and a tokenizer of made-up words."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS, "vocab_size": WORDS}
    config = LlamaConfig(num_hidden_layers=blocks, **sizes, architectures=["LlamaForCausalLM"], dtype="float32")
    config.save_pretrained(directory)
    torch.manual_seed(0)
    around = LlamaForCausalLM(LlamaConfig(num_hidden_layers=0, **sizes))
    parts = {"around": dict(around.state_dict())}
    index = write_parts(directory, parts)
    for number in range(blocks):
        block = LlamaDecoderLayer(config, number)
        with torch.no_grad():
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.02)
        prefix = f"model.layers.{number}"
        index |= write_parts(
            directory, {prefix: {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}}
        )
    content = {"metadata": {"total_size": stored(directory)}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    words = {"<unk>": 0, "</s>": 1, **{f"w{number}": number for number in range(2, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="</s>").save_pretrained(directory)


def write_parts(directory: Path, parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Write one file a part; returns the file of every tensor."""
    index = {}
    for name, tensors in parts.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / f"{name}.safetensors")
        index |= dict.fromkeys(tensors, f"{name}.safetensors")
    return index


def made_up_text() -> str:
    """Enough words for the rows."""
    generator = random.Random(0)
    return "\n".join(" ".join(f"w{generator.randint(2, WORDS - 1)}" for _ in range(64)) for _ in range(200))


def stored(directory: Path) -> int:
    """Bytes of its weights."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def converted(directory: Path, text: Path) -> dict[str, Any]:
    """Convert a checkpoint in a process of its own; its peaks in bytes, and seconds."""
    command = [sys.executable, "-m", "spmconvert", "convert", str(directory), "-o", f"{directory}-converted", "--force"]
    process = subprocess.Popen([*command, "--calib", str(text), *OPTIONS], stdout=subprocess.DEVNULL)
    peaks = {"allocated": 0, "resident": 0}
    stopped = threading.Event()

    def sample() -> None:
        while not stopped.wait(SAMPLE_SECONDS):
            found = memory_of(process.pid)
            peaks.update({name: max(peaks[name], found[name]) for name in peaks})

    watcher = threading.Thread(target=sample)
    began = time.monotonic()
    watcher.start()
    code = process.wait()
    stopped.set()
    watcher.join()
    if code:
        raise SystemExit(f"converting {directory} ended with {code}")
    return {**peaks, "seconds": time.monotonic() - began}


def memory_of(process: int) -> dict[str, int]:
    """Bytes that a process has allocated, and that it has with pages of files; zeros once it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {"allocated": 0, "resident": 0}
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    kilobytes = {name: int(fields.get(name, "0 kB").split()[0]) for name in ("RssAnon", "VmRSS")}
    return {"allocated": 1024 * kilobytes["RssAnon"], "resident": 1024 * kilobytes["VmRSS"]}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("blocks", "checkpoint GB", "allocated GB", "with mapped files GB", "seconds")
    for row in rows:
        sizes = [f"{row[name] / 1e9:.2f}" for name in ("bytes", "allocated", "resident")]
        table.add_row(str(row["blocks"]), *sizes, f"{row['seconds']:.0f}")
    Console(width=100).print(table)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """The curve of peaks by the size of the checkpoint."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    sizes = [row["bytes"] / 1e9 for row in rows]
    for name, label in (("allocated", "allocated"), ("resident", "with pages of mapped files")):
        axes.plot(sizes, [row[name] / 1e9 for row in rows], marker="o", label=label)
    axes.plot(sizes, sizes, linestyle=":", color="grey", label="the checkpoint")
    axes.set(xlabel="checkpoint, GB", ylabel="peak, GB", ylim=(0, None), title="Memory of a conversion, --keep 0.5")
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
