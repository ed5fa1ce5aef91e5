"""A sound codec with LSTMs, from a dense checkpoint to a converted one and back."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import spmconvert
from spmconvert.commands.export import export
from spmconvert.commands.finetune import finetune
from spmconvert.commands.report import report
from spmconvert.commands.verify import verify
from spmconvert.errors import CalibrationError
from tests.support import QUICK, SHORT


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """Directory of a tiny EnCodec."""
    directory = tmp_path_factory.mktemp("codec") / "encodec"
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        hidden_size=32,
        num_filters=4,
        codebook_size=64,
        codebook_dim=32,
        upsampling_ratios=[8, 4],
        sampling_rate=16000,
        num_lstm_layers=2,
        target_bandwidths=[6.0],
    )
    transformers.EncodecModel(config).eval().save_pretrained(directory)
    transformers.EncodecFeatureExtractor(sampling_rate=16000).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Short sounds as tensors."""
    file = tmp_path_factory.mktemp("sounds") / "sounds.safetensors"
    torch.manual_seed(2)
    waves = torch.randn(40, 1, 1280).cumsum(-1)
    save_file({"input_values": waves / waves.std()}, file)
    return file


def encoded(model):
    torch.manual_seed(1)
    with torch.no_grad():
        return model.encoder(torch.randn(1, 1, 1600))


def test_its_lstms_are_converted_and_used(codec, sounds, tmp_path):
    out = tmp_path / "o"
    options = {**QUICK, "stages": 0, "rank": 6, "calib": sounds}
    conversion = spmconvert.convert(codec, out, targets="*lstm*", **options)
    assert len(conversion.layers) == 8
    assert all(record.error < 0.5 for record in conversion.layers)
    model = spmconvert.load(out).eval()
    assert not [module for module in model.modules() if isinstance(module, torch.nn.LSTM)]
    dense = transformers.EncodecModel.from_pretrained(codec).eval()
    assert 0 < (encoded(model) - encoded(dense)).norm() < 0.2 * encoded(dense).norm()
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(encoded(spmconvert.load(tmp_path / "again").eval()), encoded(model), rtol=0, atol=0)
    assert {check.outcome for check in verify(out)} <= {"ok", "skipped"}
    export(out, tmp_path / "dense")
    assert set(load_file(tmp_path / "dense" / "model.safetensors")) == set(load_file(codec / "model.safetensors"))
    exported = transformers.EncodecModel.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(encoded(exported), encoded(model), rtol=1e-4, atol=1e-5)


def test_its_decoder_is_given_a_budget_trained_and_reported(codec, sounds, tmp_path):
    options = {**QUICK, "calib": sounds, "keep": 0.5, "allow_slower": True}
    spmconvert.convert(codec, tmp_path / "o", targets="decoder*lstm*", **options)
    trained = finetune(tmp_path / "o", tmp_path / "t", data=sounds, **{**SHORT, "steps": 2})
    assert trained.steps == 2
    save_file({"input_values": torch.randn(8, 1, 1280).cumsum(-1) / 20}, tmp_path / "other.safetensors")
    found = report(tmp_path / "t", data=tmp_path / "other.safetensors", seconds=0.01, rows=4)
    assert found.quality, found.not_measured
    (cosine,) = (metric for metric in found.quality[0].metrics if metric.key == "embedding")
    assert cosine.converted > 0.5


def test_gradients_that_do_not_pass_the_codes_are_said_to_be_missing(codec, sounds, tmp_path):
    options = {**QUICK, "calib": sounds, "keep": 0.5, "allow_slower": True}
    with pytest.raises(CalibrationError, match=r"encoder.*lstm.* --sensitivity none --set fit.output_weighting=false"):
        spmconvert.convert(codec, tmp_path / "o", targets="*lstm*", **options)
    free = {"sensitivity": "none", "output_weighting": False}
    conversion = spmconvert.convert(codec, tmp_path / "o", targets="*lstm*", **options, **free)
    assert conversion.layers
