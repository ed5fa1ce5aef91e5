"""Small configs of the architectures whose presets are pinned, and the snapshot of what the presets select.

``python -m tests.plan.architectures`` writes the snapshot anew; read the difference before committing it.
"""

import json
import re
from pathlib import Path

import torch
import transformers

from spmconvert.errors import TargetError
from spmconvert.plan.targets import PRESETS, select_targets

SNAPSHOT = Path(__file__).parent / "presets.json"

_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
_DECODER = {**_TEXT, "intermediate_size": 80, "num_key_value_heads": 1, "head_dim": 16}
_ENCODER = {**_TEXT, "intermediate_size": 96}
_CLIP_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 64}

# name -> (config class, model class, sizes)
ARCHITECTURES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", _DECODER),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _DECODER),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_TEXT, "intermediate_size": 128}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_DECODER, "pad_token_id": 0}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "falcon": ("FalconConfig", "FalconForCausalLM", _TEXT),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_TEXT, "intermediate_size": 128}),
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _ENCODER),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 64},
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "t5-gated": ("T5Config", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "vit": ("ViTConfig", "ViTForImageClassification", {**_ENCODER, "image_size": 32, "patch_size": 16}),
    "clip": ("CLIPConfig", "CLIPModel", {"text_config": dict(_CLIP_TOWER), "vision_config": dict(_CLIP_TOWER)}),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64, "pad_token_id": 0,
        },
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {**_TEXT, "state_size": 4}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_DECODER, "num_local_experts": 4}),
    # shared experts narrower than the model, with a gate of one output
    "qwen2-moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_DECODER, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    # attention and feed-forward in two stacks
    "xlm": (
        "XLMConfig",
        "XLMWithLMHeadModel",
        {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "n_words": 64, "bos_index": 0, "eos_index": 1, "pad_index": 2},
    ),
    # output heads in a ModuleList
    "musicgen-decoder": (
        "MusicgenDecoderConfig",
        "MusicgenForCausalLM",
        {**_TEXT, "ffn_dim": 64, "num_codebooks": 3},
    ),
    # a recurrent mixer of square layers
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {**_DECODER, "lru_width": 32, "block_types": ["recurrent", "attention"]},
    ),
    # low-rank side branches beside the feed-forward
    "gemma3n": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            **_DECODER, "laurel_rank": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
            "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    """A model of the architecture on the meta device."""
    config_class, model_class, sizes = ARCHITECTURES[name]
    with torch.device("meta"):
        return getattr(transformers, model_class)._from_config(getattr(transformers, config_class)(**sizes))


def collapsed(names: list[str]) -> list[str]:
    """Layer names with the block number written N and the number of blocks behind."""
    counts: dict[str, int] = {}
    for name in names:
        short = re.sub(r"\.(\d+)\.", ".N.", name, count=1)
        counts[short] = counts.get(short, 0) + 1
    return [f"{name} x{count}" for name, count in counts.items()]


def presets_of(name: str) -> dict[str, list[str] | str]:
    """What each preset selects, or the error."""
    model = build(name)
    found: dict[str, list[str] | str] = {}
    for preset in PRESETS:
        try:
            selection = select_targets(model, targets=[preset])
        except TargetError as error:
            found[preset] = f"error: {str(error).split(';')[0]}"
            continue
        found[preset] = collapsed([target.name for target in selection.targets])
        found["left alone"] = [f"{entry.name}: {entry.reason}" for entry in selection.skipped if ".1." not in entry.name]
    return found


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps({name: presets_of(name) for name in ARCHITECTURES}, indent=1) + "\n")
