"""Train the small language model that the quality benchmarks convert: GPT-2, Llama or a mixture, on bytes or a small BPE.

    python -m benchmarks.teacher --text wikitext-2-valid.txt --output teachers/gpt2

The comparison is fair where layers have little rank to spare; ``benchmarks.quality`` notes the energy that whitened
SVD leaves at half of the parameters. Trained by AdamW on bytes, width 256, 1000 steps, it was 0.05 %: some sixty different
inputs span little, and AdamW grows a few directions. Hence a BPE and Muon, whose updates have all singular values alike.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from spmconvert.model.opening import close_, open_

BYTES = 256
# of a mixture: experts of a block, and how many a token is given to
EXPERTS, CHOSEN = 8, 2


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="training text")
    parser.add_argument("--output", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--architecture", choices=["gpt2", "llama", "mixture"], default="gpt2")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048, help="256 bytes and merges learned from the text")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of embeddings, norms and biases, by AdamW")
    parser.add_argument("--matrix-rate", type=float, default=0.02, help="of all other matrices, by Muon")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer(options.text, options.vocabulary)
    model = build(options, len(tokenizer))
    stream = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"])
    print(f"{len(stream):,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    # Muon takes matrices, so fused experts are trained one by one
    open_(model)
    train(model, stream, options)
    close_(model)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


def build(options: argparse.Namespace, words: int) -> torch.nn.Module:
    """The untrained model."""
    end = words - 1
    common = {"vocab_size": words, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    if options.architecture == "gpt2":
        sizes = {"n_embd": options.width, "n_layer": options.layers, "n_head": options.width // 64}
        return GPT2LMHeadModel(GPT2Config(n_positions=options.block_size, **sizes, **common))
    heads = {"num_attention_heads": options.width // 64, "num_key_value_heads": options.width // 64}
    sizes = {"hidden_size": options.width, "intermediate_size": 3 * options.width, "num_hidden_layers": options.layers}
    if options.architecture == "mixture":
        experts = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": options.width}
        sizes |= {"head_dim": 64, "norm_topk_prob": True, **experts}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(max_position_embeddings=options.block_size, **sizes, **heads, **common))
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=options.block_size, **sizes, **heads, **common))


def train(model: torch.nn.Module, stream: torch.Tensor, options: argparse.Namespace) -> None:
    """Muon and AdamW with warm-up and cosine on random windows of the text."""
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim != 2 or id(p) in embeddings]
    optimizers = [
        torch.optim.Muon(matrices, lr=options.matrix_rate, weight_decay=0.0),
        torch.optim.AdamW(others, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [options.matrix_rate, options.learning_rate]
    generator = torch.Generator().manual_seed(options.seed)
    began = time.monotonic()
    model.train()
    for step in range(options.steps):
        warm = min(1.0, (step + 1) / 100)
        factor = warm * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = factor * peak
        starts = torch.randint(len(stream) - options.block_size, (options.batch_size,), generator=generator)
        ids = torch.stack([stream[start : start + options.block_size] for start in starts.tolist()])
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.3f} nats a token, {time.monotonic() - began:.0f} s", flush=True)
    model.eval()


def make_tokenizer(text: Path, words: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from the text: 256 bytes, merges, and an end of text as the last token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=max(BYTES, words - 1), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(text)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>", pad_token="<end>")


if __name__ == "__main__":
    main()
