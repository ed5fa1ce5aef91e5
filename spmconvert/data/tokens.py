"""From text files to rows of token ids, for calibration and for finetuning.

A document is a non-empty line of a .txt file, or the ``text`` of a .jsonl line, of a .parquet row or of a dataset's item;
documents shorter than a few words (headings, captions) are left out where there are longer ones. Encoders and masked
models read one document a row, cut at the row length; causal and encoder-decoder models read documents joined by the
end-of-text token and cut into full rows, as they were trained. A rest that does not fill a row is dropped.
"""

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmconvert.errors import CalibrationError, CheckpointError, first_line
from spmconvert.model.architecture import model_class
from spmconvert.outputs.probe import text_config

# what decides about tokens beside these, and makes no tokenizer alone
TOKENIZER_PARTS = ("merges*", "special_tokens*", "added_tokens*")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "spiece*")


def has_tokenizer(directory: Path) -> bool:
    """Whether a checkpoint has the files of a tokenizer; without any, transformers may answer with one of no words."""
    return any(next(directory.glob(pattern), None) for pattern in TOKENIZER_FILES)


def reads_tokens(config: Any) -> bool:
    """Whether a model can be run on tokens alone, without pictures, sound or another model's outputs."""
    if not _takes_tokens(model_class(config)):
        return False
    towers = any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config"))
    # a model that generates reads text without the pictures that belong to it; towers side by side need both
    return model_class(config).main_input_name == "input_ids" and (reads_packed(config) or not towers)


def _takes_tokens(architecture: Any) -> bool:
    """Whether token ids are all that a call has to give: the default of ``main_input_name`` is wrong for many a tower."""
    parameters = inspect.signature(architecture.forward).parameters
    needed = {
        name for name, one in parameters.items() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    }
    return "input_ids" in parameters and needed <= {"self", "input_ids"}


def reads_text(directory: Path, config: Any) -> bool:
    """Whether a checkpoint's model can be run on text alone: it reads tokens, and has a tokenizer."""
    return has_tokenizer(directory) and reads_tokens(config)


def inputs_of(config: Any) -> str:
    """What a model reads, by names of its arguments."""
    name: str = model_class(config).main_input_name
    return name if name != "input_ids" or reads_tokens(config) else f"{name} beside pictures or sound"


def check_reads_text(directory: Path, config: Any, text: object) -> None:
    """Refuse a text for a model that reads pictures or sounds.

    Raises:
        CalibrationError: when it reads none.
    """
    if not reads_tokens(config):
        raise CalibrationError(
            f"{text} is a text, and the model in {directory} reads {inputs_of(config)}; give a folder of pictures or of "
            ".wav files, its processor's tensors as .safetensors, or auto"
        )


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        CalibrationError: when there is none that can be used.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(directory):
        raise CalibrationError(f"{directory} has no tokenizer files, which a text needs; convert with --calib none")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        # transformers raises whatever its converters raise; all of it means that text cannot be tokenised here
        raise CalibrationError(
            f"{directory} has no usable tokenizer ({first_line(error)}), which a text needs; convert with --calib none"
        ) from error


def tokenizer_hash(directory: Path) -> str:
    """Hash of a checkpoint's tokenizer files by name and content."""
    total = hashlib.sha256()
    patterns = (*TOKENIZER_FILES, *TOKENIZER_PARTS)
    for file in sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()}):
        total.update(f"{file.name}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def reads_packed(config: Any) -> bool:
    """Whether a model reads rows cut from one stream of tokens, rather than one document a row."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    generates = architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    return bool(config.is_encoder_decoder or generates)


def row_length(config: Any, wanted: int) -> int:
    """The wanted number of tokens a row, or the most that the model has positions for.

    Raises:
        CheckpointError: when that takes a look at the model, and transformers has none for the config.
    """
    own = text_config(config)
    positions = getattr(own, "max_position_embeddings", None) or wanted
    reserved = (getattr(own, "pad_token_id", None) or 0) + 1
    if wanted + reserved > positions and _counts_from_padding(config, positions):
        return min(wanted, positions - reserved)
    return min(wanted, positions)


def _counts_from_padding(config: Any, positions: int) -> bool:
    """Whether positions start after that of padding, as in RoBERTa: their embedding has a row for padding then."""
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            modules = AutoModel.from_config(config, trust_remote_code=False).modules()
    except ValueError as error:
        raise CheckpointError(f"transformers has no model for a {type(config).__name__}: {first_line(error)}") from None
    embeddings = [module for module in modules if isinstance(module, torch.nn.Embedding)]
    return any(layer.num_embeddings == positions and layer.padding_idx is not None for layer in embeddings)


def token_rows(documents: list[str], tokenizer: Any, config: Any, length: int, what: object) -> list[Tensor]:
    """Rows of at most ``length`` token ids (int64), packed or one a document, as the model reads them.

    Args:
        documents: the text.
        tokenizer: of the model.
        config: of the model.
        length: most tokens a row.
        what: the text in words, for the error.

    Raises:
        CalibrationError: when packed documents do not fill one row, or a token has no embedding.
    """
    if not reads_packed(config):
        rows = tokenizer(documents, truncation=True, max_length=length)["input_ids"]
        _check_ids(max((max(ids) for ids in rows if ids), default=0), config)
        return [torch.tensor(ids) for ids in rows]
    separator = tokenizer.eos_token_id
    stream: list[int] = []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        stream += ids if separator is None else [*ids, separator]
    _check_ids(max(stream, default=0), config)
    if len(stream) < length:
        raise CalibrationError(
            f"{what} has {len(stream)} tokens, one row has {length}; use a longer text or fewer tokens a row"
        )
    return [torch.tensor(stream[start : start + length]) for start in range(0, len(stream) - length + 1, length)]


def _check_ids(largest: int, config: Any) -> None:
    """Refuse a tokenizer that is of another model.

    Raises:
        CalibrationError: when a token has no embedding.
    """
    size = getattr(text_config(config), "vocab_size", None)
    if size is not None and largest >= size:
        raise CalibrationError(
            f"the tokenizer gives a token the id {largest}, and the model has embeddings for {size}; put the tokenizer of "
            "this model there"
        )


def keeps_cache(config: Any) -> bool:
    """Whether a model would keep what it computed of every token for the next ones."""
    # of models of several towers the one for text says so
    return any(hasattr(own, "use_cache") for own in (config, text_config(config)))


def padded_batch(rows: list[Tensor], padding: int, model: Any) -> dict[str, Any]:
    """Rows as keyword arguments of the model, padded on the right, on its device."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    batch: dict[str, Any] = {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}
    if keeps_cache(model.config):
        batch["use_cache"] = False
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch
