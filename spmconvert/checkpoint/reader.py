"""Opening a dense checkpoint: a local directory or a hub id, safetensors only, headers first.

Nothing is loaded until it is asked for, tensor by tensor. Pickle weights are refused, and nothing in a checkpoint is run.
This module imports torch only where a tensor is read.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spmconvert.checkpoint.headers import INDEX_FILE, PICKLE_SUFFIXES, TensorEntry, read_header, read_headers
from spmconvert.checkpoint.manifest import CHECKSUM_FILE, PROVENANCE_FILE, QUANT_METHOD, REPORT_FILES
from spmconvert.errors import CheckpointError, CorruptCheckpointError, ModelNotFoundError, first_line
from spmconvert.system.files import file_hash
from spmconvert.system.parsing import parse_json

if TYPE_CHECKING:
    import torch

# what is fetched from the hub: no weights but safetensors
HUB_PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "tokenizer*",
    "*LICENSE*",
    "README.md",
)
# of PEFT
ADAPTER_FILE = "adapter_config.json"
# keys of a config that say how many there are of something that has tensors
COUNTED = re.compile(r"n_layers?|n_blocks|depth|\w*num_(\w+_)?(layers|blocks|experts)|\w*(encoder|decoder)_layers")
# of a model in a browser, with or without the owner; what follows is a page of it
ADDRESS = re.compile(
    r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/(?P<name>[\w.-]+(/(?!tree/|blob/|resolve/|raw/)[\w.-]+)?)|https?://"
)
# of classes, which a base model has no tensor for
MOST_LABELS = 1_000_000
CHAT_TEMPLATES = "additional_chat_templates"
WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite")
WRITTEN_ANEW = ("config.json", "README.md", PROVENANCE_FILE, INDEX_FILE, CHECKSUM_FILE, *REPORT_FILES)


@dataclass(frozen=True)
class Checkpoint:
    """A dense checkpoint whose headers have been read and checked.

    Attributes:
        directory: where its files are.
        name: its id on the hub, or the full path of a local directory.
        revision: commit on the hub, or None for a local directory.
        config: config.json.
        tensors: every tensor by name, in the order of files and offsets.
    """

    directory: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]

    def read(self, name: str) -> "torch.Tensor":
        """One tensor, on the CPU in its own dtype.

        Raises:
            CorruptCheckpointError: when the library refuses it: a damaged header, or a dtype that torch does not have.
            CheckpointError: when its file cannot be read any more.
        """
        return self._read(name, lambda file: file.get_tensor(name))

    def read_part(self, name: str, index: int) -> "torch.Tensor":
        """One entry of a tensor's first axis, without reading the others; raises as ``read``."""
        return self._read(name, lambda file: file.get_slice(name)[index])

    def _read(self, name: str, read: "Callable[[Any], torch.Tensor]") -> "torch.Tensor":
        from safetensors import SafetensorError, safe_open

        entry = self.tensors[name]
        try:
            with safe_open(entry.file, "pt") as file:
                return read(file)
        except SafetensorError as error:
            raise CorruptCheckpointError(
                f"tensor {name} ({entry.dtype}) of {entry.file} is refused ({first_line(error)}); download or save it again"
            ) from error
        except OSError as error:
            raise _unreadable(entry.file, error) from error

    def read_finite(self, name: str) -> "torch.Tensor":
        """One floating-point tensor without infinities and NaNs.

        Raises:
            CorruptCheckpointError: when there are any.
        """
        tensor = self.read(name)
        # torch has no isfinite for every 8-bit float
        values = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
        bad = int((~values.isfinite()).sum())
        if bad:
            raise CorruptCheckpointError(
                f"tensor {name} has {bad} values that are not finite; convert another checkpoint, or leave the layer out "
                "with --ignore"
            )
        return tensor

    def companion_files(self) -> list[Path]:
        """Tokenizer, processor, generation config, chat templates, licences: what is neither weights nor rewritten.

        Of the folders only those that belong to the model: chat templates, and the modules of sentence-transformers with
        their own weights. Others hold the model in other formats, or earlier states of its training.

        Raises:
            CheckpointError: when one is a link to something outside of the checkpoint.
        """
        companions = []
        for path in sorted(self.directory.iterdir()):
            is_weight = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
            skipped = path.name.startswith(".") or path.name in WRITTEN_ANEW
            if path.is_file() and not is_weight and not skipped:
                companions.append(path)
        for folder in self._companion_folders():
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            pickles = [path for path in files if path.suffix in PICKLE_SUFFIXES]
            if pickles and not any(path.suffix == ".safetensors" for path in files):
                raise CheckpointError(
                    f"{pickles[0]} is a pickle, which can run code and is never read, and the module {folder.name} has no "
                    "other weights; save the model again with sentence-transformers, which writes safetensors"
                )
            companions += [path for path in files if path not in pickles]
        for path in companions:
            self.check_inside(path)
            _check_name(path)
        return companions

    def _companion_folders(self) -> list[Path]:
        names = {CHAT_TEMPLATES}
        modules = self.directory / "modules.json"
        if modules.is_file():
            try:
                names |= {entry["path"] for entry in parse_json(modules.read_text(encoding="utf-8"))}
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(f"{modules} is not a list of modules with paths; download it again") from None
        # a module without a folder is the transformer itself
        plain = sorted(name for name in names if isinstance(name, str) and Path(name).name == name and name != "..")
        folders = [self.directory / name for name in plain if name and (self.directory / name).is_dir()]
        for folder in folders:
            self.check_inside(folder)
        return folders

    def check_inside(self, path: Path) -> None:
        """Refuse a link out of the checkpoint; the hub's cache keeps the files of a commit as links to blobs beside it.

        Raises:
            CheckpointError: when it is one.
        """
        roots = [self.directory.resolve()]
        roots += [parent.parent / "blobs" for parent in roots[0].parents if parent.name == "snapshots"]
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise CheckpointError(
                f"{path} is a link to {path.resolve()}, outside of the checkpoint; put the file itself there, or remove it"
            )

    def sha256(self) -> str:
        """Content hash over config.json and the weight files."""
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        total = hashlib.sha256((self.directory / "config.json").read_bytes())
        for file in sorted({entry.file for entry in self.tensors.values()}):
            total.update(f"{file.name}\n{file_hash(file)}\n".encode())
        return total.hexdigest()


def _check_name(path: Path) -> None:
    """Refuse a file whose name is no text of one line, which lists of files and terminals cannot hold."""
    if not path.name.isprintable():
        raise CheckpointError(
            f"{path.parent} has a file with the name {path.name!r}, which is no text of one line; rename it or remove it"
        )


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint and check its headers.

    Args:
        model: local directory, or hub id such as ``gpt2`` or ``owner/name``.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelNotFoundError: when there is no such directory and no such model can be reached.
        CheckpointError: when it is not a checkpoint that can be converted.
        CorruptCheckpointError: when its files contradict each other.
    """
    path = Path(os.path.expanduser(model))  # noqa: PTH111 - leaves an unknown ~user as it is instead of raising
    commit = None
    # an empty name would be the working directory; os.path.exists is False for a name too long for the system
    if not model or not os.path.exists(path):  # noqa: PTH110
        path = _download(model, revision)
        commit = path.name
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and model.safetensors")
    try:
        # a relative path would mean another place to the commands that come later
        name = model if commit else str(path.resolve())
        config, tensors = _read_config(path), read_headers(path)
        check_counts(path / "config.json", config, tensors)
        return Checkpoint(path, name, commit, config, tensors)
    except OSError as error:
        raise _unreadable(path, error) from error


def check_counts(file: Path, config: Any, tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse a config that speaks of more blocks, experts or labels than the tensors can be of, before any are built.

    Args:
        file: the config, for the error.
        config: its content, or a part of it.
        tensors: of the checkpoint.

    Raises:
        CorruptCheckpointError: when it does.
    """
    # blocks and experts have tensors of their own, or a row of one
    most = len(tensors) + max((size for entry in tensors.values() for size in entry.shape), default=0)
    parts = [config]
    while parts:
        part = parts.pop()
        for key, value in part.items():
            if isinstance(value, dict):
                parts.append(value)
            elif isinstance(value, int) and COUNTED.fullmatch(key) and value > most:
                raise CorruptCheckpointError(
                    f"{file} has {key} {value:,}, and no tensor is so large nor are there so many; download it again"
                )
            elif key == "num_labels" and isinstance(value, int) and value > MOST_LABELS:
                raise CorruptCheckpointError(
                    f"{file} has {key} {value:,}; at most {MOST_LABELS:,} are read; download it again"
                )


def open_loaded(name: str, files: Sequence[Path]) -> Checkpoint:
    """The checkpoint that a model has been loaded from: of the revision, subfolder and variant of its files.

    Args:
        name: what it was loaded by: a hub id or a directory.
        files: its weight files, in one directory.

    Raises:
        CheckpointError: when the model came from no safetensors files, or the directory is no checkpoint.
        CorruptCheckpointError: when a file contradicts itself.
    """
    if not files or any(file.suffix != ".safetensors" for file in files):
        what = files[0].name if files else "a state dict"
        raise CheckpointError(f"model {name!r} was loaded from {what}; only safetensors files can be converted")
    directory = files[0].parent
    commit = hub_commit(directory)
    tensors = {tensor: entry for file in files for tensor, entry in read_header(file).items()}
    name = name if commit else str(directory.resolve())
    return Checkpoint(directory, name, commit, _read_config(directory), tensors)


def tokenizer_place(checkpoint: Checkpoint) -> Path:
    """Where the tokenizer of a loaded model is: beside its weights, or at the root of the repository around them.

    ``from_pretrained`` fetches weights and configs alone; for a model of the hub the rest of that commit is fetched here.
    """
    if checkpoint.revision is None:
        return checkpoint.directory
    root = _download(checkpoint.name, checkpoint.revision)
    beside = any(checkpoint.directory.glob("tokenizer*"))
    return checkpoint.directory if beside else root


def hub_commit(directory: Path) -> str | None:
    """The commit of a directory in the hub's cache, ``models--owner--name/snapshots/COMMIT/...``, or None elsewhere."""
    parts = directory.absolute().parts
    for index, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[index + 1] == "snapshots":
            return parts[index + 2]
    return None


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        inner = next((found.parent.name for found in sorted(directory.glob("0_*/config.json"))), None)
        if inner is not None:
            raise CheckpointError(
                f"{directory} keeps its transformer in {inner}, as old versions of sentence-transformers did; load it with "
                "a newer one and save it again, which puts it beside modules.json"
            )
        raise CheckpointError(f"{directory} has no config.json; give the directory of a Hugging Face checkpoint")
    if (directory / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{directory} has an adapter beside its weights ({ADAPTER_FILE}), which transformers would add to them; merge "
            "it with merge_and_unload and save the model elsewhere, or remove the adapter's files"
        )
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{file} is not JSON; download or save the checkpoint again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object; download or save the checkpoint again")
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method == QUANT_METHOD:
            raise CheckpointError(f"{directory} is already converted; convert the dense checkpoint it was made from")
        raise CheckpointError(f"{directory} is quantised with {method!r}; only unquantised checkpoints can be converted")
    return config


# characters of what the hub's client says that are worth a line
REASON = 60


def _download(model: str, revision: str | None) -> Path:
    looks_local = not model or model.startswith((".", "~", os.sep)) or model.count("/") > 1 or model.endswith("/")
    if (address := ADDRESS.match(model)) is not None:
        name = address["name"]
        remedy = f"give the hub id: {name}" if name else "give a hub id such as gpt2, or a directory"
        raise ModelNotFoundError(f"{model} is an address, which is not what models are named by; {remedy}")
    if looks_local:
        raise ModelNotFoundError(f"there is no directory {model!r}; check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    # the client lets errors of its HTTP library through, and which library that is differs between its versions
    except Exception as error:
        raise ModelNotFoundError(
            f"there is no directory {model!r}, and the hub has no such model within reach ({first_line(error)[:REASON]}); "
            "give a local directory of the checkpoint, or check the name, the network and HF_HUB_OFFLINE"
        ) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} cannot be read (gone); restore it, then repeat the command, with --resume")
    # safetensors raises system errors of one argument
    reason = error.strerror or str(error)
    return CheckpointError(f"{path} cannot be read ({reason}); check that it is there and its permissions")
