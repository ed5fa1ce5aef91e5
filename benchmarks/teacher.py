"""Train the small language model that the quality benchmarks convert: a GPT-2 or Llama type on bytes.

    python -m benchmarks.teacher --text wikitext-2-valid.txt --output teachers/gpt2

Bytes need no vocabulary to be learned and keep the model compact, so that its layers have little rank to spare: whether
they do is printed by ``benchmarks.distillation`` as the energy that whitened SVD leaves at half of the parameters.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = 256
VOCABULARY = 257


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="training text")
    parser.add_argument("--output", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--architecture", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = build(options)
    stream = torch.tensor(list(options.text.read_bytes()), dtype=torch.uint8)
    train(model, stream, options)
    model.save_pretrained(options.output)
    byte_tokenizer().save_pretrained(options.output)


def build(options: argparse.Namespace) -> torch.nn.Module:
    """The untrained model."""
    common = {"vocab_size": VOCABULARY, "bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
    if options.architecture == "gpt2":
        sizes = {"n_embd": options.width, "n_layer": options.layers, "n_head": options.width // 64}
        return GPT2LMHeadModel(GPT2Config(n_positions=options.block_size, **sizes, **common))
    heads = {"num_attention_heads": options.width // 64, "num_key_value_heads": options.width // 64}
    sizes = {"hidden_size": options.width, "intermediate_size": 3 * options.width, "num_hidden_layers": options.layers}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=options.block_size, **sizes, **heads, **common))


def train(model: torch.nn.Module, stream: torch.Tensor, options: argparse.Namespace) -> None:
    """AdamW with warm-up and cosine on random windows of the text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    generator = torch.Generator().manual_seed(options.seed)
    began = time.monotonic()
    model.train()
    for step in range(options.steps):
        warm = min(1.0, (step + 1) / 100)
        rate = options.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(stream) - options.block_size, (options.batch_size,), generator=generator)
        ids = torch.stack([stream[start : start + options.block_size] for start in starts.tolist()]).long()
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.3f} nats a byte, {time.monotonic() - began:.0f} s", flush=True)
    model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, numbered by its value, and an end of text."""
    alphabet = _byte_characters()
    vocabulary = {character: value for value, character in alphabet.items()}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": END}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>", pad_token="<end>")


def _byte_characters() -> dict[int, str]:
    """The character by which byte-level tokenizers write every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return {**{value: chr(value) for value in printable}, **{value: chr(256 + i) for i, value in enumerate(others)}}


if __name__ == "__main__":
    main()
