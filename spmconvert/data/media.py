"""Pictures and sounds as the tensors of a model's own processor: of a folder of files, or made up where there is none.

Made-up pictures are smooth noise in the spectra that photographs have, made-up sounds chirps over noise. They show a model
sizes and frequencies that it expects, and nothing that it knows; files like what it is used for are better
(docs/results.md has by how much). Either is processed once and kept in the cache as a .safetensors file, one
item a row, which everything that reads rows reads; a file of a processor's tensors may also be given as it is.
"""

import hashlib
import inspect
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spmconvert.data.library import Part, library_text
from spmconvert.data.pictured import PROCESSOR_FILES, joined, pictured, reads_pictures_beside_text
from spmconvert.data.tokens import has_tokenizer, keeps_cache, load_tokenizer, tokenizer_hash
from spmconvert.errors import CalibrationError, first_line
from spmconvert.model.architecture import model_class
from spmconvert.system.caches import cache_directory, check_cache, keep
from spmconvert.system.files import file_hash

Kind = Literal["pictures", "sounds", "pictures with text"]
KINDS: dict[str, Kind] = {"pixel_values": "pictures", "input_features": "sounds", "input_values": "sounds"}
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
SUFFIXES: dict[Kind, tuple[str, ...]] = {"pictures": _PICTURES, "sounds": (".wav",), "pictures with text": _PICTURES}
TENSOR_SUFFIX = ".safetensors"
# what files of made-up items begin with
MADE_UP = "made-up-"
# items that are made up for each part
COUNTS: dict[Part, int] = {"calibration": 160, "training": 256, "evaluation": 64}
# most files of a folder that are read, spread over all of them
MOST_FILES = 1024
PICTURE_SIZE = 256
SECONDS = 5.0
# of a file; a longer one is cut
MOST_SECONDS = 10.0
# files that are held in memory before they are processed
TOGETHER = 64
DECODER_TOKENS = 32
# changes with anything that changes what is made or kept
VERSION = 2

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MediaRow:
    """One item as the model's processor gives it.

    Attributes:
        tensors: keyword arguments of the model, without the axis of items.
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        """About as many positions as the model makes of it: what memory is reckoned by."""
        return max(1, max(tensor.numel() for tensor in self.tensors.values()) // 256)


def media_of(directory: Path, config: Any) -> Kind | None:
    """What a checkpoint's model looks at or listens to, where a processor says how; None for any other."""
    if reads_pictures_beside_text(directory, config):
        return "pictures with text"
    has_processor = any((directory / name).is_file() for name in PROCESSOR_FILES)
    return KINDS.get(model_class(config).main_input_name) if has_processor else None


def made_up(part: Part, directory: Path, config: Any) -> Path:
    """Made-up items for a model of pictures or sounds, in the cache; no item is in two parts.

    Args:
        part: what they are for.
        directory: checkpoint, for its processor.
        config: the model's config.

    Returns:
        A .safetensors file.

    Raises:
        CalibrationError: when there is no processor that can be used.
        NotWritableError: when the cache cannot be written.
    """
    kind = media_of(directory, config)
    if kind is None:
        raise CalibrationError(f"{directory} has no processor ({' or '.join(PROCESSOR_FILES)}) of pictures or sounds")
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(part.encode()).digest()[:8]))
    processor = _processor(kind, directory)

    def items(start: int, stop: int) -> list[Array]:
        make = partial(chirps, generator, _rate(processor)) if kind == "sounds" else partial(smooth_noise, generator)
        return [make() for _ in range(start, stop)]

    source = _Source(f"{MADE_UP}{kind.replace(' ', '-')}-{part}", f"{COUNTS[part]}", COUNTS[part], items, part)
    return _kept(source, kind, processor, directory, config)


def folder_inputs(folder: Path, directory: Path, config: Any) -> Path:
    """The files of a folder, and of those in it, as a .safetensors file in the cache; pictures, or sounds as .wav.

    Of more than ``MOST_FILES`` so many are read, spread over all; sounds are cut after ``MOST_SECONDS``.

    Raises:
        CalibrationError: when the model reads neither, the folder has no such files, or one cannot be read.
        NotWritableError: when the cache cannot be written.
    """
    kind = media_of(directory, config)
    if kind is None:
        raise CalibrationError(
            f"{folder} is a folder, and {directory} has a model of neither pictures nor sounds; give a file"
        )
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES[kind] and file.is_file())
    if len(files) < 2:
        endings = ", ".join(SUFFIXES[kind])
        raise CalibrationError(f"{folder} has {len(files)} {kind} ({endings}); give a folder of at least a few dozen")
    files = [files[len(files) * index // MOST_FILES] for index in range(MOST_FILES)] if len(files) > MOST_FILES else files
    processor = _processor(kind, directory)
    read: Callable[[Path], Array] = partial(read_sound, rate=_rate(processor)) if kind == "sounds" else read_picture
    digest = hashlib.sha256("".join(f"{file.name} {file_hash(file)}\n" for file in files).encode()).hexdigest()

    def items(start: int, stop: int) -> list[Array]:
        return [read(file) for file in files[start:stop]]

    source = _Source(folder.resolve().name, digest, len(files), items, "calibration")
    return _kept(source, kind, processor, directory, config)


def read_tensors(file: Path, config: Any) -> dict[str, Tensor]:
    """A processor's tensors by name, each [items, ...].

    Raises:
        CalibrationError: when the file cannot be read, the numbers of items differ, or the decoder has no inputs.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(
            f"{file} cannot be read: {first_line(error)}; give the processor's tensors as safetensors"
        ) from None
    lengths = {name: len(tensor) for name, tensor in tensors.items() if tensor.ndim}
    if not tensors or len(lengths) != len(tensors) or len(set(lengths.values())) != 1:
        raise CalibrationError(f"{file} has tensors of {lengths} items; all need the same number, one row an item")
    if config.is_encoder_decoder and "decoder_input_ids" not in tensors:
        raise CalibrationError(f"{file} has no decoder_input_ids, which {config.model_type} needs; add them")
    return tensors


def media_rows(file: Path, config: Any) -> list[MediaRow]:
    """The same, an item a row."""
    tensors = read_tensors(file, config)
    count = len(next(iter(tensors.values())))
    return [MediaRow({name: tensor[index] for name, tensor in tensors.items()}) for index in range(count)]


def media_batch(rows: Sequence[MediaRow], model: Any) -> dict[str, Any]:
    """Rows as keyword arguments of a model, on its device and pictures in its dtype."""
    batch = joined({name: torch.stack([row.tensors[name] for row in rows]).to(model.device) for name in rows[0].tensors})
    given: dict[str, Any] = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()
    }
    if "input_ids" in given and keeps_cache(model.config):
        given["use_cache"] = False
    return given


def smooth_noise(generator: np.random.Generator) -> Array:
    """A picture [height, width, 3] (uint8) of noise whose amplitude falls with a power of the frequency."""
    side = PICTURE_SIZE
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) * side
    spectrum = np.maximum(frequency, 1) ** -generator.uniform(0.8, 2.0)
    noise = np.fft.rfft2(generator.standard_normal((3, side, side))) * spectrum
    layers = np.fft.irfft2(noise, s=(side, side))
    layers /= layers.std(axis=(1, 2), keepdims=True)
    # colours of photographs follow their brightness
    share = generator.uniform(0.1, 0.6)
    picture = (1 - share) * layers[:1] + share * layers
    brightness, contrast = generator.uniform(90, 160), generator.uniform(25, 70)
    return (brightness + contrast * picture).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def chirps(generator: np.random.Generator, rate: int) -> Array:
    """A sound [samples] (float32, within ±1) of tones that slide and fade, over quiet noise."""
    samples = int(SECONDS * rate)
    time = np.arange(samples) / rate
    spectrum = np.fft.rfft(generator.standard_normal(samples)) * np.maximum(np.arange(samples // 2 + 1), 1.0) ** -0.5
    noise = np.fft.irfft(spectrum, samples)
    sound = generator.uniform(0.01, 0.1) * noise / noise.std()
    for _ in range(generator.integers(2, 9)):
        begin, width = generator.uniform(0, SECONDS), generator.uniform(0.1, 1.5)
        first, last = np.exp(generator.uniform(np.log(80), np.log(0.45 * rate), size=2))
        phase = 2 * np.pi * (first * time + (last - first) * time**2 / (2 * SECONDS))
        harmonics = sum(np.sin(order * phase) / order for order in range(1, generator.integers(2, 6)))
        sound += generator.uniform(0.05, 0.4) * np.exp(-(((time - begin) / width) ** 2)) * harmonics
    return (sound / max(1.0, float(np.abs(sound).max()))).astype(np.float32)


def read_picture(file: Path) -> Array:
    """A picture [height, width, 3] (uint8).

    Raises:
        CalibrationError: when it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise CalibrationError(
            f"{file} cannot be read as a picture: {first_line(error)}; remove it or save it again"
        ) from None


def read_sound(file: Path, rate: int) -> Array:
    """A sound [samples] (float32, within ±1), its channels mixed, at another rate.

    Raises:
        CalibrationError: when it is no .wav file of whole numbers.
    """
    try:
        with wave.open(str(file)) as sound:
            width, channels, own_rate = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            data = sound.readframes(int(MOST_SECONDS * own_rate))
    except (OSError, EOFError, wave.Error) as error:
        raise CalibrationError(f"{file} cannot be read as a .wav file of PCM: {first_line(error)}; save it again") from None
    raw = np.frombuffer(data[: len(data) - len(data) % (width * channels)], dtype=np.uint8).reshape(-1, width)
    if not len(raw):
        raise CalibrationError(f"{file} has no samples; remove it")
    # the highest bytes of a 32-bit number, so that all widths are read alike; 8 bits have no sign
    wide = np.zeros((len(raw), 4), dtype=np.uint8)
    wide[:, 4 - width :] = raw ^ 0x80 if width == 1 else raw
    samples = wide.view("<i4").reshape(-1, channels).mean(axis=1) / 2**31
    return resampled(samples, own_rate, rate).astype(np.float32)


def resampled(samples: Array, rate: int, wanted: int) -> Array:
    """A sound at another rate, without what that cannot hold."""
    if rate == wanted:
        return samples
    count = max(1, round(len(samples) * wanted / rate))
    spectrum = np.fft.rfft(samples)
    kept = np.zeros(count // 2 + 1, dtype=spectrum.dtype)
    common = min(len(kept), len(spectrum))
    kept[:common] = spectrum[:common]
    return np.fft.irfft(kept, count) * (count / len(samples))


@dataclass(frozen=True)
class _Source:
    """Where items come from.

    Attributes:
        name: what the file in the cache is called after.
        content: what decides about them, for its hash.
        count: number of items.
        items: makes or reads some of them, from one to before another.
        part: of prose, that a decoder is given.
    """

    name: str
    content: str
    count: int
    items: Callable[[int, int], list[Array]]
    part: Part


def _kept(source: _Source, kind: Kind, processor: Any, directory: Path, config: Any) -> Path:
    """The tensors of items in the cache; made where they are not there."""
    count = source.count
    rules = "".join(file_hash(directory / name) for name in PROCESSOR_FILES if (directory / name).is_file())
    key = f"{VERSION} {source.name} {source.content} {kind} {rules} {tokenizer_hash(directory)} {config.architectures}"
    file = cache_directory("inputs") / f"{source.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}{TENSOR_SUFFIX}"
    if file.exists():
        return file
    check_cache("inputs")
    pieces = []
    for start in range(0, count, TOGETHER):
        items = source.items(start, min(start + TOGETHER, count))
        if kind == "pictures with text":
            pieces.append(pictured(items, start, source.part, processor, directory, config))
        else:
            pieces.append(_processed(items, kind, processor, directory, config))
    names = set.intersection(*(set(piece) for piece in pieces))
    tensors = {name: torch.cat(_alike([piece[name] for piece in pieces])) for name in sorted(names)}
    if config.is_encoder_decoder:
        tensors["decoder_input_ids"] = _decoder_ids(source.part, directory, config).expand(count, -1)
    from safetensors.torch import save_file

    keep(file, lambda path: save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path))
    return file


def _processed(items: list[Array], kind: Kind, processor: Any, directory: Path, config: Any) -> dict[str, Tensor]:
    """What the processor makes of items, as far as the model takes it."""
    try:
        if kind == "pictures":
            found = processor(images=items, return_tensors="pt")
        else:
            longest = max(len(item) for item in items)
            same = [np.pad(item, (0, longest - len(item))) for item in items]
            found = processor(same, sampling_rate=_rate(processor), return_tensors="pt")
    except Exception as error:
        # processors raise whatever the libraries under them raise
        raise CalibrationError(f"the processor of {directory} fails on {kind}: {first_line(error)}") from error
    known = inspect.signature(model_class(config).forward).parameters
    return {
        name: tensor
        for name, tensor in found.items()
        if name in known and name != "labels" and isinstance(tensor, Tensor) and len(tensor) == len(items)
    }


def _alike(pieces: list[Tensor]) -> list[Tensor]:
    """Pieces with zeros at the end, where sounds of one are shorter than those of another."""
    longest = [max(sizes) for sizes in zip(*(piece.shape[1:] for piece in pieces), strict=True)]
    padded = []
    for piece in pieces:
        ends = [(0, size - own) for size, own in zip(longest, piece.shape[1:], strict=True)]
        padded.append(torch.nn.functional.pad(piece, [number for pair in reversed(ends) for number in pair]))
    return padded


def _decoder_ids(part: Part, directory: Path, config: Any) -> Tensor:
    """What a decoder is given beside pictures or sounds: its start, and prose where there is a tokenizer; [1, tokens]."""
    start = getattr(config, "decoder_start_token_id", None) or 0
    if not has_tokenizer(directory):
        return torch.tensor([[start]])
    prose = library_text(part).read_text(encoding="utf-8")[: 100 * DECODER_TOKENS]
    ids = load_tokenizer(directory)(prose, add_special_tokens=False)["input_ids"]
    return torch.tensor([[start, *ids[: DECODER_TOKENS - 1]]])


def _processor(kind: Kind, directory: Path) -> Any:
    """The checkpoint's own.

    Raises:
        CalibrationError: when transformers cannot make it.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    loaders: dict[Kind, Any] = {
        "pictures": AutoImageProcessor,
        "sounds": AutoFeatureExtractor,
        "pictures with text": AutoProcessor,
    }
    try:
        return loaders[kind].from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        # transformers raises whatever its loaders and optional libraries raise
        raise CalibrationError(
            f"{directory} has no processor for {kind} that can be used ({first_line(error)}); give its tensors as "
            "FILE.safetensors"
        ) from error


def _rate(processor: Any) -> int:
    """Samples a second that a processor of sounds wants."""
    return int(processor.sampling_rate)
