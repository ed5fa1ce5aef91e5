"""Families of models whose own code stands in the way of a replaced layer, or asks for more than its signature says."""

import pytest
import torch
import transformers

import spmconvert
from spmconvert import SPMLinear
from spmconvert.commands.report import report
from spmconvert.errors import CalibrationError
from tests.conftest import _tokenizer
from tests.support import QUICK, SHORT

SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SIDES = {
    f"{side}_{key}": size
    for side in ("encoder", "decoder")
    for key, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
}


@pytest.fixture(scope="module")
def segmenting(tmp_path_factory):
    """A tiny MaskFormer, whose prediction head runs a plain list of the layers that it has as children, too."""
    directory = tmp_path_factory.mktemp("families") / "maskformer"
    torch.manual_seed(0)
    config = transformers.MaskFormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN, window_size=2, out_features=STAGES),
        decoder_config=transformers.DetrConfig(**SIDES, d_model=32, num_queries=4, use_timm_backbone=False),
        fpn_feature_size=32,
        mask_feature_size=32,
    )
    transformers.MaskFormerForInstanceSegmentation(config).save_pretrained(directory)
    return directory


def test_a_head_that_keeps_its_layers_in_a_plain_list_runs_the_replaced_ones(segmenting, tmp_path):
    spmconvert.convert(segmenting, tmp_path / "o", targets="mask_embedder.*", stages=0, rank=4)
    model = spmconvert.load(tmp_path / "o").eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SPMLinear)}
    called = []
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(pixel_values=picture)[1]
    assert set(called) == set(layers) == {f"mask_embedder.{index}.0" for index in range(3)}
    for form in ("dense", "portable"):
        spmconvert.export(tmp_path / "o", tmp_path / form, form=form)
        exported = transformers.AutoModelForInstanceSegmentation.from_pretrained(tmp_path / form, trust_remote_code=True)
        with torch.no_grad():
            torch.testing.assert_close(exported.eval()(pixel_values=picture)[1], found, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def boxed(tmp_path_factory):
    """A tiny BROS, which reads where words stand, and calls that optional."""
    directory = tmp_path_factory.mktemp("families") / "bros"
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BrosConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=1)
    transformers.BrosModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("sequential", [True, False])
def test_a_model_that_wants_more_than_tokens_is_refused_by_its_own_words(boxed, text, tmp_path, sequential):
    options = {**QUICK, "sequential": sequential, "calib": text, "stages": 0, "rank": 4}
    with pytest.raises(CalibrationError, match=r"BrosModel does not run on .* alone: You have to specify bbox; give "):
        spmconvert.convert(boxed, tmp_path / "o", targets="mlp", **options)


def test_a_model_that_wants_more_than_tokens_is_converted_without(boxed, text, tmp_path):
    spmconvert.convert(boxed, tmp_path / "o", targets="mlp", stages=0, rank=4)
    found = report(tmp_path / "o", data=text, rows=4, seconds=0.01)
    assert not found.quality
    assert any("You have to specify bbox" in missing.reason for missing in found.not_measured)
    exported = spmconvert.export(tmp_path / "o", tmp_path / "d")
    assert exported.difference is None
    assert "beside more" in exported.compared
    with pytest.raises(CalibrationError, match="You have to specify bbox"):
        spmconvert.finetune(tmp_path / "o", tmp_path / "ft", data=text, **SHORT)
