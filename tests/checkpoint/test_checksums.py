"""The list of hashes in a checkpoint: what it has to name, and what of it is refused."""

import subprocess

import pytest

from spmconvert.checkpoint.checksums import listed_files, read_checksums, write_checksums
from spmconvert.checkpoint.manifest import CHECKSUM_FILE
from spmconvert.errors import CheckpointError, CorruptCheckpointError

HASH = "0" * 64


@pytest.fixture
def checkpoint(tmp_path):
    contents = ("config.json", "model.safetensors", "2_Dense/model.safetensors", "name with  spaces.txt")
    unlisted = ("README.md", "spm.json", "report.json", "report.html", ".git/config", ".cache/x/y.json", ".gitattributes")
    for name in (*contents, *unlisted):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_what_decides_about_the_outputs_is_listed(checkpoint):
    write_checksums(checkpoint)
    found = read_checksums(checkpoint)
    assert list(found) == listed_files(checkpoint)
    assert set(found) == {"config.json", "model.safetensors", "2_Dense/model.safetensors", "name with  spaces.txt"}
    checked = subprocess.run(
        ["sha256sum", "-c", CHECKSUM_FILE], cwd=checkpoint, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_without_a_list(tmp_path):
    with pytest.raises(CheckpointError, match="has no checksums"):
        read_checksums(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "config.json",
        f"{HASH} config.json",
        f"{HASH[1:]}  config.json",
        f"{HASH}  /etc/passwd",
        f"{HASH}  ../config.json",
        f"{HASH}  a/../../config.json",
        f"{HASH}  config.json\n{HASH}  config.json",
        b"\xff",
    ],
)
def test_lines_that_are_not_understood(tmp_path, content):
    (tmp_path / CHECKSUM_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorruptCheckpointError) as caught:
        read_checksums(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_list_that_cannot_be_read(tmp_path):
    (tmp_path / CHECKSUM_FILE).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checksums(tmp_path)
