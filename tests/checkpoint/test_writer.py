"""The output directory: complete or absent, locked, and never over something that was there."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.errors import CorruptCheckpointError, LockedError, NotWritableError, OutputError, SpaceError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 3)}


def directory(path, **options):
    return OutputDirectory(path, **{"fingerprint": "f", "force": False, "resume": False, "needed_bytes": 10, **options})


def entries(tensors):
    return [(name, t.numel() * t.element_size(), lambda t=t: t) for name, t in tensors.items()]


def write(path, marker="x", **options):
    with directory(path, **options) as target:
        target.write_weights(entries(TENSORS))
        target.add_text("config.json", marker)
        target.commit()


def test_commit_makes_the_output_and_nothing_else(tmp_path):
    write(tmp_path / "deep" / "out")
    found = load_file(tmp_path / "deep" / "out" / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "model.safetensors").stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_shards_and_index(tmp_path):
    import json

    with directory(tmp_path / "out") as target:
        target.write_weights(entries(TENSORS), shard_bytes=24)
        target.commit()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == 32


def test_without_commit_nothing_appears(tmp_path):
    with directory(tmp_path / "out") as target:
        target.write_weights(entries(TENSORS))
    assert not (tmp_path / "out").exists()


def test_layers_survive_and_resume(tmp_path):
    with directory(tmp_path / "out") as target:
        target.store_layer("h.0", TENSORS, {"error": 0.5})
    with directory(tmp_path / "out", resume=True) as target:
        tensors, record = target.load_layer("h.0")
        assert record == {"error": 0.5}
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
        assert target.load_layer("h.1") is None
    with directory(tmp_path / "out") as target:
        assert target.load_layer("h.0") is None, "a run without --resume starts over"


def test_damaged_layer(tmp_path):
    with directory(tmp_path / "out") as target:
        target.store_layer("h.0", TENSORS, {})
        next((target.partial / "layers").glob("*.safetensors")).write_bytes(b"short")
        with pytest.raises(CorruptCheckpointError, match="damaged"):
            target.load_layer("h.0")


def test_resume_needs_the_same_run(tmp_path):
    with pytest.raises(OutputError, match="no unfinished run"), directory(tmp_path / "out", resume=True):
        pass
    with directory(tmp_path / "out"):
        pass
    with pytest.raises(OutputError, match="other settings"), directory(tmp_path / "out", resume=True, fingerprint="g"):
        pass


def test_existing_output(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="--force"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    write(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_force_never_replaces_what_is_not_a_checkpoint(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(OutputError, match="does not replace"):
            write(tmp_path / name, force=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_second_run_is_refused(tmp_path):
    code = (
        "from pathlib import Path; from spmconvert.checkpoint.writer import OutputDirectory as O\n"
        f"with O(Path({str(tmp_path / 'out')!r}), fingerprint='f', force=False, resume=True, needed_bytes=1): pass"
    )
    with directory(tmp_path / "out"):
        with pytest.raises(LockedError, match="another run"), directory(tmp_path / "out"):
            pass
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "LockedError" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, "the lock ends with the run"


def test_no_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 5 * 10**6))
    with (
        pytest.raises(SpaceError, match=r"0\.01 GB free, the output needs 1\.10 GB"),
        directory(tmp_path / "o", needed_bytes=10**9),
    ):
        pass


def test_space_that_runs_out_later(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with directory(tmp_path / "out") as target:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SpaceError, match="--resume"):
            target.store_layer("h.0", TENSORS, {})


def test_no_permission(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "out", Path("/proc/none/out")):
        with pytest.raises(NotWritableError, match="-o"), directory(path):
            pass


@pytest.mark.parametrize("step", range(4))
def test_killed_while_committing(tmp_path, step):
    """The old output, the new one, or none at a known place: never half of one."""
    write(tmp_path / "out", "old")
    code = f"""
import os, pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent.parent.parent)!r})
from tests.checkpoint.test_writer import write
real, count = pathlib.Path.rename, [0]
def rename(self, other):
    if {step} % 2 == 0 and count[0] == {step} // 2:
        os.kill(os.getpid(), 9)
    result = real(self, other)
    if {step} % 2 == 1 and count[0] == {step} // 2:
        os.kill(os.getpid(), 9)
    count[0] += 1
    return result
pathlib.Path.rename = rename
write(pathlib.Path({str(tmp_path / "out")!r}), "new", force=True)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    if (tmp_path / "out").exists():
        assert (tmp_path / "out" / "config.json").read_text() == ("new" if step == 3 else "old")
        assert load_file(tmp_path / "out" / "model.safetensors")
    write(tmp_path / "out", "newest", force=True)
    assert (tmp_path / "out" / "config.json").read_text() == "newest"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
