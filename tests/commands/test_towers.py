"""Models of several towers by text alone: the tower for text is converted as the language model that it is."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import spmconvert
from spmconvert.commands.report import report
from tests.conftest import _save, _tokenizer, llama_config
from tests.support import QUICK, SHORT

EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny Llama, and the same weights as the tower for text of a LLaVA."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    text = llama_config()
    alone = transformers.LlamaForCausalLM(text)
    _save(alone, root / "llama")
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config={"model_type": "clip_vision_model", **EYES, "patch_size": 8},
        image_token_index=95,
        pad_token_id=1,
    )
    seeing = transformers.LlavaForConditionalGeneration(config)
    seeing.model.language_model.load_state_dict(alone.model.state_dict())
    seeing.lm_head.load_state_dict(alone.lm_head.state_dict())
    seeing.save_pretrained(root / "llava")
    _tokenizer().save_pretrained(root / "llava")
    return {name: root / name for name in ("llama", "llava")}


def test_the_tower_for_text_becomes_what_it_becomes_alone(pair, text, tmp_path):
    """Block by block: nothing of one run, such as its keys and values, is in the next one."""
    matrices, blocks = {}, {}
    for name, source in pair.items():
        for refine in (0, 1):
            options = {**QUICK, "stages": 0, "rank": 6, "sequential": True, "fit.refine": refine}
            spmconvert.convert(source, tmp_path / f"{name}{refine}", calib=text, **options)
        matrices[name] = {
            key.rpartition("layers.")[2]: module.to_dense()
            for key, module in spmconvert.load(tmp_path / f"{name}0").named_modules()
            if isinstance(module, spmconvert.SPMLinear)
        }
        refined = json.loads((tmp_path / f"{name}1" / "spm.json").read_text())["refined"]["blocks"]
        blocks[name] = {key.rpartition(".")[2]: errors for key, errors in refined.items()}
    torch.testing.assert_close(matrices["llava"], matrices["llama"], rtol=1e-3, atol=1e-4)
    # the order of the batches goes by the names of blocks
    first = {name: errors["0"] for name, errors in blocks.items()}
    assert first["llava"]["before"] == pytest.approx(first["llama"]["before"], rel=1e-3)
    assert first["llava"]["after"] == pytest.approx(first["llama"]["after"], rel=0.05)


def test_a_model_with_eyes_is_finetuned_reported_and_exported_by_text(pair, text, other_text, tmp_path):
    spmconvert.convert(pair["llava"], tmp_path / "o", calib=text, stages=0, rank=6, **QUICK)
    tuned = spmconvert.finetune(tmp_path / "o", tmp_path / "ft", data=text, **SHORT)
    assert tuned.best_loss <= tuned.start_loss
    found = report(tmp_path / "ft", data=other_text, rows=4, seconds=0.01)
    assert [metric.key for metric in found.quality[0].metrics] == ["kl", "top1", "perplexity"]
    assert found.timing
    assert not [check for check in spmconvert.verify(tmp_path / "ft") if check.outcome == "FAILED"]
    result = spmconvert.export(tmp_path / "ft", tmp_path / "dense")
    assert load_file(result.output / "model.safetensors").keys() == load_file(pair["llava"] / "model.safetensors").keys()
