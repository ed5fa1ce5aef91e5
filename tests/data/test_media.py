"""Pictures and sounds as rows: made up, of folders, of a processor's tensors, and what is refused."""

import wave

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import spmconvert
from spmconvert.budget.times import TimeTable
from spmconvert.commands.report import report
from spmconvert.data import media
from spmconvert.data.rows import row_batch, row_key
from spmconvert.data.standin import stand_in
from spmconvert.errors import CalibrationError
from spmconvert.model.architecture import load_config
from tests.support import QUICK, assert_refused, files_of


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(media, "COUNTS", {"calibration": 40, "training": 24, "evaluation": 12})
    monkeypatch.setattr(media, "SECONDS", 0.5)
    monkeypatch.setattr(media, "TOGETHER", 16)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "cats").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(40):
        shape = (generator.integers(20, 60), generator.integers(20, 60), 3)
        Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)).save(folder / "cats" / f"{index}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def write_wave(file, samples, *, rate=8000, width=2, channels=1):
    """Samples within ±1 as PCM of so many bytes."""
    scaled = (np.asarray(samples) * (2 ** (8 * width - 1) - 1)).round().astype("<i4")
    raw = (
        (scaled + 128).astype(np.uint8).tobytes()
        if width == 1
        else b"".join(int(value).to_bytes(4, "little", signed=True)[:width] for value in scaled)
    )
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(raw)


@pytest.mark.parametrize(
    ("name", "kind", "keys"),
    [
        ("vit", "pictures", {"pixel_values"}),
        ("wav2vec2", "sounds", {"input_values"}),
        ("whisper", "sounds", {"input_features", "decoder_input_ids"}),
    ],
)
def test_made_up_items_are_what_the_processor_makes_of_them(checkpoints, name, kind, keys):
    directory = checkpoints[name]
    config = load_config(directory)
    found = {part: stand_in(part, directory, config) for part in ("calibration", "training", "evaluation")}
    assert {entry.what for entry in found.values()} == {f"made-up {kind}"}
    tensors = {part: media.read_tensors(entry.file, config) for part, entry in found.items()}
    assert {part: len(next(iter(entry.values()))) for part, entry in tensors.items()} == media.COUNTS
    assert all(set(entry) == keys for entry in tensors.values())
    rows = [row for entry in found.values() for row in media.media_rows(entry.file, config)]
    assert len({row_key(row) for row in rows}) == len(rows)
    with torch.no_grad():
        model = spmconvert.load(directory)
        assert model(**row_batch(rows[:3], 0, model))[0].isfinite().all()
    # the same again, and taken from the cache
    before = found["training"].file.read_bytes()
    found["training"].file.unlink()
    assert media.made_up("training", directory, config).read_bytes() == before


def test_made_up_pictures_and_sounds_look_like_some():
    generator = np.random.default_rng(0)
    pictures = np.stack([media.smooth_noise(generator) for _ in range(8)]).astype(float)
    assert pictures.shape == (8, 256, 256, 3)
    neighbours = np.corrcoef(pictures[:, :, :-1].ravel(), pictures[:, :, 1:].ravel())[0, 1]
    colours = np.corrcoef(pictures[..., 0].ravel(), pictures[..., 1].ravel())[0, 1]
    assert neighbours > 0.7
    assert colours > 0.5
    sound = media.chirps(generator, 16000)
    assert sound.shape == (8000,)
    assert 0.01 < np.abs(sound).max() <= 1


def test_a_folder_of_pictures(checkpoints, pictures, tmp_path):
    """Read once, by content; and what calibrates a conversion, trains it and measures it."""
    config = load_config(checkpoints["vit"])
    file = media.folder_inputs(pictures, checkpoints["vit"], config)
    assert file.name.startswith("pictures-")
    assert load_file(file)["pixel_values"].shape == (40, 3, 32, 32)
    Image.new("RGB", (30, 30)).save(pictures / "cats" / "0.png")
    assert media.folder_inputs(pictures, checkpoints["vit"], config) != file
    options = {**QUICK, "stages": 0, "rank": 8}
    spmconvert.convert(checkpoints["vit"], tmp_path / "o", calib=pictures, **options)
    tuned = spmconvert.finetune(tmp_path / "o", data=pictures, steps=2, batch_size=4)
    assert tuned.steps == 2
    found = report(tmp_path / "o", data=pictures, rows=6, seconds=0.01)
    assert found.quality[0].metrics[0].key == "agreement"
    assert "rows that the conversion did not use" in found.quality[0].rows_from
    assert [row.shape for row in found.timing] == ["1 x 3 x 32 x 32"]
    assert [row.tokens for row in found.timing] == [17]


def test_more_files_than_are_read_are_spread(checkpoints, pictures, monkeypatch):
    monkeypatch.setattr(media, "MOST_FILES", 10)
    file = media.folder_inputs(pictures, checkpoints["vit"], load_config(checkpoints["vit"]))
    assert load_file(file)["pixel_values"].shape[0] == 10


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sounds_of_every_width(tmp_path, width):
    samples = 0.7 * np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    write_wave(tmp_path / "a.wav", samples, width=width)
    read = media.read_sound(tmp_path / "a.wav", 8000)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, samples, atol=2.0 ** (2 - 8 * width) + 1e-6)


def test_sounds_are_mixed_cut_and_resampled(tmp_path, monkeypatch):
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    write_wave(tmp_path / "a.wav", np.stack([0.8 * tone, 0.2 * tone], axis=1).ravel(), channels=2)
    np.testing.assert_allclose(media.read_sound(tmp_path / "a.wav", 8000), 0.5 * tone, atol=1e-4)
    # a tone is the same tone at another rate, and one beyond the rate is gone
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(media.read_sound(tmp_path / "a.wav", 16000), wanted, atol=1e-3)
    assert np.abs(media.read_sound(tmp_path / "a.wav", 800)).max() < 1e-3
    monkeypatch.setattr(media, "MOST_SECONDS", 0.25)
    assert len(media.read_sound(tmp_path / "a.wav", 8000)) == 2000


def test_sounds_of_different_lengths_are_rows_of_one(checkpoints, tmp_path):
    for index, count in enumerate([3000, 5000, 4000, 6000]):
        write_wave(tmp_path / f"{index}.wav", np.full(count, 0.5), rate=16000)
    media_file = media.folder_inputs(tmp_path, checkpoints["wav2vec2"], load_config(checkpoints["wav2vec2"]))
    assert load_file(media_file)["input_values"].shape == (4, 6000)


def test_sounds_of_later_pieces_may_be_longer():
    pieces = media._alike([torch.ones(2, 3), torch.ones(1, 5)])
    assert torch.cat(pieces).sum(1).tolist() == [3, 3, 5]


def test_tensors_of_a_processor_calibrate(checkpoints, tmp_path):
    file = stand_in("calibration", checkpoints["vit"], load_config(checkpoints["vit"])).file
    given = tmp_path / "own.safetensors"
    given.write_bytes(file.read_bytes())
    options = {**QUICK, "stages": 0, "rank": 8}
    spmconvert.convert(checkpoints["vit"], tmp_path / "a", calib=given, **options)
    spmconvert.convert(checkpoints["vit"], tmp_path / "b", calib="auto", **options)
    a, b = (files_of(tmp_path / name) for name in "ab")
    assert a["model.safetensors"] == b["model.safetensors"]


def test_three_commands_for_pictures(run, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--refine", "0", "--set", "fit.iterations=2", "--structures", "lowrank", "--allow-slower"]
    code, out, err = run("convert", checkpoints["vit"], "--keep", "0.5", *quick, "--measure")
    assert code == 0, err
    assert "calibrated on made-up pictures; a folder of pictures" in err
    assert "for 17 tokens" in out
    assert "same class against the dense model, on made-up pictures" in out
    code, _, err = run("finetune", "--steps", "2", "--batch-size", "2")
    assert code == 0, err
    assert "trained on made-up pictures" in err
    code, out, err = run("report", "--rows", "4", "--seconds", "0.01", "--json")
    assert code == 0, err
    assert (tmp_path / "vit-spm-ft" / "report.html").is_file()
    assert " tokens</caption>" not in (tmp_path / "vit-spm-ft" / "report.html").read_text()


def test_what_is_taken_without_a_design(run, checkpoints, tmp_path, monkeypatch):
    """A share for models that read no tokens; without data low rank, which needs none."""
    # on a busy machine the time of layers as small as these says nothing
    monkeypatch.setattr(TimeTable, "is_slower", lambda *_: False)
    code, _, err = run("convert", checkpoints["vit"], "-o", tmp_path / "a", "--set", "fit.iterations=2", "--refine", "0")
    assert code == 0, err
    assert "no design and no budget is named: --keep 0.5" in err
    code, _, err = run("convert", checkpoints["vit"], "-o", tmp_path / "b", "--calib", "none", "--json")
    assert code == 0, err
    assert "no calibration data" in err
    layers = spmconvert.load(tmp_path / "b")
    kinds = {
        type(term.term).kind for m in layers.modules() if isinstance(m, spmconvert.SPMLinear) for term in m.term_modules
    }
    assert kinds <= {"lowrank"}


@pytest.mark.parametrize(
    ("name", "calib", "words"),
    [
        ("vit", "text", "reads pixel_values; give a folder of pictures"),
        ("whisper", "text", "reads input_features"),
        ("vit", "empty", "has 0 pictures"),
        ("wav2vec2", "pictures", "has 0 sounds (.wav)"),
        ("bert", "pictures", "has a model of neither pictures nor sounds"),
    ],
)
def test_what_a_model_cannot_read_is_refused(run, checkpoints, pictures, text, tmp_path, name, calib, words):
    (tmp_path / "empty").mkdir()
    given = {"text": text, "empty": tmp_path / "empty", "pictures": pictures}[calib]
    assert_refused(run("convert", checkpoints[name], "-o", tmp_path / "o", "--calib", given), CalibrationError, words)


def test_files_that_cannot_be_read_are_named(checkpoints, pictures, tmp_path):
    (pictures / "bad.png").write_bytes(b"no picture")
    with pytest.raises(CalibrationError, match=r"bad\.png cannot be read as a picture"):
        media.folder_inputs(pictures, checkpoints["vit"], load_config(checkpoints["vit"]))
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    with pytest.raises(CalibrationError, match=r"bad\.wav cannot be read as a \.wav file of PCM"):
        media.read_sound(tmp_path / "bad.wav", 8000)
    write_wave(tmp_path / "none.wav", [])
    with pytest.raises(CalibrationError, match="has no samples"):
        media.read_sound(tmp_path / "none.wav", 8000)


def test_a_processor_that_cannot_be_made(checkpoints, tmp_path):
    import shutil

    shutil.copytree(checkpoints["vit"], tmp_path / "s")
    (tmp_path / "s" / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(CalibrationError, match="no processor for pictures that can be used"):
        media.made_up("evaluation", tmp_path / "s", load_config(tmp_path / "s"))


def test_tensors_that_do_not_belong_together(checkpoints, tmp_path):
    config = load_config(checkpoints["whisper"])
    save_file({"input_features": torch.zeros(3, 80, 200), "other": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CalibrationError, match="all need the same number"):
        media.read_tensors(tmp_path / "a.safetensors", config)
    save_file({"input_features": torch.zeros(3, 80, 200)}, tmp_path / "b.safetensors")
    with pytest.raises(CalibrationError, match="no decoder_input_ids"):
        media.read_tensors(tmp_path / "b.safetensors", config)
