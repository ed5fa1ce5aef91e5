"""Tiny models from config classes, built once a session without network; and a real text to calibrate on."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from spmconvert.cli import app as cli
from spmconvert.commands.convert import convert
from spmconvert.commands.report import report

VOCABULARY = 96


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<pad>", "</s>", *(chr(code) for code in range(32, 125))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def _save(model, directory: Path, **options) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            # larger than the usual initialisation, so that every layer matters to the output
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(directory, **options)
    _tokenizer().save_pretrained(directory)
    return directory


def gpt2_config(**changes) -> GPT2Config:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
    return GPT2Config(**{**sizes, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, **changes})


def llama_config(**changes) -> LlamaConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
    }
    return LlamaConfig(**{**sizes, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, **changes})


def bert_config(**changes) -> BertConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
    }
    return BertConfig(**{**sizes, "pad_token_id": 1, **changes})


def mixtral_config() -> MixtralConfig:
    return MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=64,
        vocab_size=VOCABULARY,
    )


def vit_config() -> ViTConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)


def wav2vec2_config() -> Wav2Vec2Config:
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    waves = {"conv_dim": (16, 16), "conv_stride": (32, 16), "conv_kernel": (32, 16), "num_feat_extract_layers": 2}
    return Wav2Vec2Config(**sizes, **waves, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)


def whisper_config() -> WhisperConfig:
    sides = {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    return WhisperConfig(
        **sides,
        d_model=32,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        vocab_size=VOCABULARY,
        max_source_positions=100,
        num_mel_bins=80,
        decoder_start_token_id=2,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def _save_media(model, processor, directory: Path, *, tokenizer: bool = False) -> Path:
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    if tokenizer:
        _tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Directories of tiny dense checkpoints by name."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    return {
        "gpt2": _save(GPT2LMHeadModel(gpt2_config()), root / "gpt2"),
        "llama": _save(LlamaForCausalLM(llama_config()), root / "llama"),
        "llama-tied": _save(LlamaForCausalLM(llama_config(tie_word_embeddings=True)), root / "llama-tied"),
        "llama-sharded": _save(LlamaForCausalLM(llama_config()), root / "llama-sharded", max_shard_size="20KB"),
        "llama-bf16": _save(LlamaForCausalLM(llama_config()).to(torch.bfloat16), root / "llama-bf16"),
        "bert": _save(BertModel(bert_config()), root / "bert"),
        "mixtral": _save(MixtralForCausalLM(mixtral_config()), root / "mixtral"),
        "vit": _save_media(
            ViTForImageClassification(vit_config()), ViTImageProcessor(size={"height": 32, "width": 32}), root / "vit"
        ),
        "wav2vec2": _save_media(Wav2Vec2Model(wav2vec2_config()), Wav2Vec2FeatureExtractor(), root / "wav2vec2"),
        "whisper": _save_media(
            WhisperForConditionalGeneration(whisper_config()),
            WhisperFeatureExtractor(chunk_length=2),
            root / "whisper",
            tokenizer=True,
        ),
    }


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A calibration text of a few hundred lines of made-up words."""
    generator = random.Random(0)
    words = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 8))) for _ in range(200)]
    lines = [" ".join(generator.choices(words, k=generator.randint(14, 30))) for _ in range(300)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def other_text(tmp_path_factory) -> Path:
    """A text that nothing was fitted on."""
    generator = random.Random(7)
    lines = ["".join(generator.choices("bcdfgjkmpqvwxyz ", k=90)) for _ in range(120)]
    file = tmp_path_factory.mktemp("other") / "other.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


class Converted(dict[str, Path]):
    """Converted checkpoints by the name of the dense one, each made when it is first asked for."""

    def __init__(self, checkpoints: dict[str, Path], text: Path, root: Path) -> None:
        super().__init__()
        self.checkpoints, self.text, self.root = checkpoints, text, root

    def __missing__(self, name: str) -> Path:
        # a few dense layers of a kind that others are converted of
        only = {"layers": "0"} if name == "llama" else {}
        options = {"calib": self.text, "fit.iterations": 20, "calibration.rows": 24, "fit.refine": 0, **only}
        convert(self.checkpoints[name], self.root / name, targets="mlp", **options)
        self[name] = self.root / name
        return self[name]


@pytest.fixture(scope="session")
def converted(checkpoints, text, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints whose MLPs were replaced, fitted on the calibration text; no test may change them."""
    return Converted(checkpoints, text, tmp_path_factory.mktemp("converted"))


# what the layers of a tiny Llama are sums of, by a name
SUMS = {
    "lowrank": {"stages": 0, "rank": 6},
    "sparse24": {"design.terms": [{"kind": "sparse24"}]},
    "wrapped": {"design.terms": [{"kind": "sparse24", "wrap": True}], "allow_growth": True},
    "spm+lowrank": {"rank": 4},
    "sparse24+lowrank": {"design.terms": [{"kind": "lowrank", "rank": 3}, {"kind": "sparse24"}]},
    "mixed": {
        "overrides": [
            {"pattern": "*.gate_proj", "terms": [{"kind": "lowrank", "rank": 6}]},
            {"pattern": "*.up_proj", "terms": [{"kind": "sparse24"}]},
        ]
    },
}


class Sums(dict[str, Path]):
    """The tiny Llama with layers of other terms than stages, each made when it is first asked for."""

    def __init__(self, checkpoints: dict[str, Path], text: Path, root: Path) -> None:
        super().__init__()
        self.checkpoints, self.text, self.root = checkpoints, text, root

    def __missing__(self, name: str) -> Path:
        options = {"calib": self.text, "fit.iterations": 4, "calibration.rows": 24, "fit.refine": 0, "new_bias": True}
        options |= SUMS[name]
        convert(self.checkpoints["llama"], self.root / name, targets="mlp", **options)
        self[name] = self.root / name
        return self[name]


@pytest.fixture(scope="session")
def sums(checkpoints, text, tmp_path_factory) -> dict[str, Path]:
    """Converted checkpoints by what their layers are sums of; no test may change them."""
    return Sums(checkpoints, text, tmp_path_factory.mktemp("sums"))


@pytest.fixture(scope="session")
def gpt2_spm(converted) -> Path:
    """The converted tiny GPT-2."""
    return converted["gpt2"]


@pytest.fixture(scope="session")
def quick_report(gpt2_spm, text, other_text):
    """A report with every part."""
    return report(gpt2_spm, data=other_text, other_data=text, baselines=True, rows=6, seconds=0.01)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    """A cache of its own for every test."""
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def typed_ahead(tmp_path):
    """A line on the standard input of this process."""
    (tmp_path / "input").write_text("y\n")
    descriptor, ours = os.open(tmp_path / "input", os.O_RDONLY), os.dup(0)
    os.dup2(descriptor, 0)
    yield
    os.dup2(ours, 0)
    os.close(descriptor)
    os.close(ours)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; returns exit code, standard output and standard error.

    Whole models are measured at the end where ``--measure`` says so.
    """

    def call(*arguments):
        if arguments[:1] in (("convert",), ("finetune",)) and "--measure" not in arguments:
            arguments = (*arguments, "--no-measure")
        monkeypatch.setattr(sys, "argv", ["spmconvert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        code = ended.value.code
        return (0 if code is None else code), captured.out, captured.err

    return call
