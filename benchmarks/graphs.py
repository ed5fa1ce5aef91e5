"""Time of a model as ONNX in onnxruntime: dense and converted, in turn in one run.

    python -m benchmarks.graphs minilm-spm-ft --json benchmarks/results/graphs.json

The dense graph is recorded by the same exporter as the converted one. Figures are medians in milliseconds of one row, and
the ratio of the dense graph's time to the converted one's: above 1 the conversion is faster. Threads of a session do not
spin while the other one runs, which would disturb it; in PyTorch a report times both.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import spmconvert
from benchmarks.environment import cpu_name, environment
from spmconvert.checkpoint.converted import open_converted
from spmconvert.exporting.graph import NamedOutputs, Recorded
from spmconvert.system.timing import interleaved_seconds

DENSE, CONVERTED = "dense", "converted"


def main() -> None:
    """Record both, time, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="converted checkpoint of a model that reads tokens")
    parser.add_argument("--dense", type=Path, help="its source, where it is not where it was")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each number of tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    converted = open_converted(options.directory)
    source = options.dense or converted.provenance["source"]["name"]
    dense = spmconvert.load(source, dtype="float32").eval()
    recorded = Recorded.of(converted, torch.float32)
    graphs = {DENSE: replace(recorded, model=NamedOutputs(dense).eval()), CONVERTED: recorded}
    rows = []
    with tempfile.TemporaryDirectory() as place:
        sessions = {name: _session(graph, Path(place) / f"{name}.onnx", options.threads) for name, graph in graphs.items()}
        for tokens in options.tokens:
            rows.append(_row(tokens, dense.config.vocab_size, sessions, options.seconds))
            print({key: round(value, 2) for key, value in rows[-1].items()}, flush=True)
    if options.json:
        found = {"environment": environment(cpu_name(), "float32", options.threads), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _session(recorded: Recorded, file: Path, threads: int) -> Any:
    import onnx_ir
    import onnxruntime

    onnx_ir.save(recorded.exported("exporter_onnx:OnnxExporter", "OnnxConfig"), file)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])


def _row(tokens: int, words: int, sessions: dict[str, Any], seconds: float) -> dict[str, float]:
    ids = torch.randint(0, words, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    calls: dict[str, Callable[[], Any]] = {}
    for name, session in sessions.items():
        feed = {one.name: batch[one.name].numpy() for one in session.get_inputs()}
        calls[name] = lambda session=session, feed=feed: session.run(None, feed)
    times = {name: 1e3 * median(found) for name, found in interleaved_seconds(calls, seconds, "cpu").items()}
    return {"tokens": tokens, **times, "ratio": times[DENSE] / times[CONVERTED]}


if __name__ == "__main__":
    main()
