"""What several test files ask of an output or of a run of the command."""

import hashlib
import json
import os
from pathlib import Path

from spmconvert.checkpoint.headers import read_headers

# a conversion of a tiny model that takes about a second
QUICK = {"fit.iterations": 8, "calibration.rows": 24, "fit.refine": 0}
# a finetune of one, in the precision that every machine has
SHORT = {"steps": 12, "batch_size": 4, "block_size": 32, "evaluate_every": 6, "save_every": 4, "evaluation_rows": 8}
SHORT |= {"precision": "fp32"}

# a module in a checkpoint that shows that it ran
CODE_OF_ITS_OWN = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import GPT2Config as OwnConfig, GPT2LMHeadModel as OwnModel, PreTrainedTokenizerFast as OwnTokenizer
"""


def files_of(directory: Path) -> dict[str, str]:
    """Content hash of every file; seconds in the provenance are the only thing that may differ between two runs."""
    hashes = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = file.read_bytes()
        if file.name == "spm.json":
            record = json.loads(content)
            for layer in record["layers"]:
                layer["seconds"] = 0
            content = json.dumps(record).encode()
        hashes[str(file.relative_to(directory))] = hashlib.sha256(content).hexdigest()
    return hashes


def raw_tensors(directory: Path) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every tensor of a dense or a converted checkpoint."""
    result = {}
    for name, entry in read_headers(directory).items():
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            result[name] = (entry.dtype, file.read(entry.nbytes))
    return result


def assert_refused(result, error, *words):
    """One line on standard error with the words, nothing on standard output, the error's exit code."""
    code, out, err = result
    assert code == error.exit_code, err
    lines = [line for line in err.strip().splitlines() if "error:" in line]
    assert len(lines) == 1, err
    assert out == ""
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in err


def watch_disk(monkeypatch) -> list[tuple[str, Path]]:
    """Note every file or directory that is put onto the disk or gets another name from here on, in that order."""
    happened: list[tuple[str, Path]] = []
    sync = os.fsync

    def synced(descriptor):
        happened.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    def noted(move):
        def renamed(path, target):
            happened.append(("rename", path))
            return move(path, target)

        return renamed

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, noted(getattr(Path, name)))
    return happened
