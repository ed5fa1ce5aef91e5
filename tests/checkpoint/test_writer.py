"""The output directory: complete or absent, locked, and never over something that was there."""

import errno
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spmconvert.checkpoint.headers import read_headers
from spmconvert.checkpoint.places import check_apart
from spmconvert.checkpoint.reader import open_checkpoint
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.errors import (
    CheckpointError,
    CorruptCheckpointError,
    LockedError,
    NotWritableError,
    OptionError,
    OutputError,
    SpaceError,
)
from tests.support import watch_disk

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
    names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert names == {"checksums.sha256", "config.json", "model.safetensors"}
    assert (tmp_path / "deep" / "out" / "model.safetensors").stat().st_mode & 0o444 == 0o444 & ~_umask()


def test_everything_is_on_the_disk_before_the_output_appears_and_then_its_name(tmp_path, monkeypatch):
    with directory(tmp_path / "out") as target:
        target.write_weights(entries(TENSORS))
        (target.final / "below").mkdir()
        target.add_text("below/notes.txt", "x")
        happened = watch_disk(monkeypatch)
        target.commit()
        final = target.final
    renames = [path for what, path in happened if what == "rename"]
    note, output = (happened.index(("rename", path)) for path in renames)
    assert renames[1] == final, "the note that it begins comes first"
    written = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")} | {Path()}
    assert len(written) == 5, "weights, checksums, notes, their directory and the output"
    synced = [path for what, path in happened[:note] if what == "sync"]
    assert {path.relative_to(final) for path in synced if path.is_relative_to(final)} == written
    assert happened[note + 1 : output] == [("sync", final.parent)]
    assert happened[output + 1 :] == [("sync", tmp_path)]


def test_what_a_run_keeps_to_go_on_from_is_on_the_disk(tmp_path, monkeypatch):
    with directory(tmp_path / "out") as target:
        happened = watch_disk(monkeypatch)
        target.store_layer("h.0", TENSORS, {})
        target.store_file("state.bin", b"state")
        assert [what for what, _ in happened] == 2 * ["sync", "rename", "sync"]
        assert [happened[index][1] for index in (2, 5)] == [target.partial / "layers", target.partial]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_shards_and_index(tmp_path):
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


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path):
    tensors = {"a": torch.ones(4), "large": torch.zeros(9), "b": torch.ones(2), "c": torch.ones(3)}
    with directory(tmp_path / "out") as target:
        target.write_weights(entries(tensors), shard_bytes=24)
        target.commit()
    names = [list(load_file(file)) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert names == [["large"], ["a", "b"], ["c"]]
    found = read_headers(tmp_path / "out")
    assert {name: entry.shape for name, entry in found.items()} == {name: tuple(t.shape) for name, t in tensors.items()}


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    alive = []

    def read(name):
        alive[:] = [reference for reference in alive if reference() is not None]
        assert len(alive) < 2, f"{len(alive)} tensors of other shards are still held when {name} is read"
        tensor = torch.ones(2)
        alive.append(weakref.ref(tensor))
        return tensor

    with directory(tmp_path / "out") as target:
        target.write_weights([(name, 8, partial(read, name)) for name in "abcdef"], shard_bytes=16)


def test_without_commit_nothing_appears(tmp_path):
    with directory(tmp_path / "out") as target:
        target.write_weights(entries(TENSORS))
    assert not (tmp_path / "out").exists()


def test_layers_survive_and_resume(tmp_path):
    with directory(tmp_path / "out") as target:
        target.store_layer("h.0", TENSORS, {"error": 0.5})
    with directory(tmp_path / "out", resume=True) as target:
        tensors, record = target.layers.load("h.0")
        assert record == {"error": 0.5}
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
        assert target.layers.load("h.1") is None
    with pytest.raises(OutputError, match=r"1 finished layers; continue it with --resume, or discard it with --force"):
        directory(tmp_path / "out").__enter__()
    with directory(tmp_path / "out", resume=True) as target:
        assert target.layers.load("h.0") is not None, "still there"
    with directory(tmp_path / "out", force=True) as target:
        assert target.layers.load("h.0") is None, "given up"


def test_damaged_layer(tmp_path):
    with directory(tmp_path / "out") as target:
        target.store_layer("h.0", TENSORS, {})
        next((target.partial / "layers").glob("*.safetensors")).write_bytes(b"short")
        with pytest.raises(CorruptCheckpointError, match="damaged"):
            target.layers.load("h.0")


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


@pytest.mark.parametrize("name", ["chapter1.tex", "notes/chapter1.tex", "link"])
def test_force_never_replaces_an_output_with_a_file_of_somebody_else(tmp_path, name):
    write(tmp_path / "out", "old")
    file = tmp_path / "out" / name
    file.parent.mkdir(exist_ok=True)
    if name == "link":
        (tmp_path / "elsewhere").write_text("x")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_text("x")
    with pytest.raises(OutputError, match=f"{name}, which spmconvert did not write"):
        write(tmp_path / "out", "new", force=True)
    assert file.read_text() == "x"
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    with directory(tmp_path / "out", replaces=[name]) as target:
        target.write_weights(entries(TENSORS))
        target.add_file(name, file)
        target.commit()
    assert file.read_text() == "x", "the new output has it, too"


def test_what_appears_while_a_run_lasts_is_not_overwritten(tmp_path):
    with directory(tmp_path / "out") as target:
        target.write_weights(entries(TENSORS))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "chapter1.tex").write_text("x")
        with pytest.raises(OutputError, match=r"chapter1\.tex"):
            target.commit()
    assert (tmp_path / "out" / "chapter1.tex").read_text() == "x"


@pytest.mark.parametrize("name", [".out.old", ".out.partial", ".out.lock"])
@pytest.mark.parametrize("force", [False, True])
def test_hidden_neighbours_of_somebody_else_are_left_alone(tmp_path, name, force):
    if force:
        write(tmp_path / "out", "old")
    neighbour = tmp_path / name
    if name == ".out.lock":
        neighbour.write_text("x")
    else:
        neighbour.mkdir()
        (neighbour / "chapter1.tex").write_text("x")
    if name == ".out.old":
        # no run uses this name
        write(tmp_path / "out", "new", force=force)
    else:
        with pytest.raises(OutputError, match="move it away"):
            write(tmp_path / "out", "new", force=force)
    assert (neighbour if name == ".out.lock" else neighbour / "chapter1.tex").read_text() == "x"


@pytest.mark.parametrize(
    ("output", "source", "relation"),
    [
        ("a", "a", "is"),
        ("a", "a/b", "holds"),
        ("a", "a/b/text.txt", "holds"),
        ("a/b/c", "a", "lies inside of"),
        ("link", "a", "is"),
        ("link/c", "a/b", None),
        ("a/b2", "a/b", None),
        ("c", "nothing", None),
    ],
)
def test_outputs_are_apart_from_what_a_run_reads(tmp_path, output, source, relation):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "text.txt").write_text("x")
    (tmp_path / "link").symlink_to("a")
    reads = {"nothing": None, "text": tmp_path / source}
    if relation is None:
        check_apart(tmp_path / output, reads)
    else:
        with pytest.raises(OptionError, match=f"{output} {relation} the text .*-o"):
            check_apart(tmp_path / output, reads)


@pytest.mark.parametrize("aside", ["../precious", "precious", ".out.0123456789abcdef.old/../precious", "", 3])
def test_only_an_output_that_was_put_aside_is_removed(tmp_path, aside):
    (tmp_path / "home" / "precious").mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    write(tmp_path / "home" / "out")
    partial = tmp_path / "home" / ".out.partial"
    partial.mkdir()
    (partial / "run.json").write_text("{}")
    (partial / "commit.json").write_text(json.dumps({"aside": aside}))
    with pytest.raises(OutputError, match=r"commit\.json is damaged"):
        write(tmp_path / "home" / "out", "new", force=True)
    assert (tmp_path / "home" / "precious").exists()
    assert (tmp_path / "precious").exists()


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
        pytest.raises(SpaceError, match=r"5\.0 MB free, the output needs 1\.1 GB"),
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


def test_space_that_runs_out_in_the_last_step(tmp_path, monkeypatch):
    import safetensors.torch

    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SpaceError, match="--resume"):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_place_that_refuses(tmp_path, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(NotWritableError, match=os.strerror(code)), directory(tmp_path / "deep" / "out"):
        pass


def test_errors_of_the_source_are_not_errors_of_the_output(tmp_path):
    def gone():
        raise CheckpointError("the source is gone")

    with directory(tmp_path / "out") as target:
        with pytest.raises(CheckpointError, match=r"missing\.json cannot be read"):
            target.add_file("missing.json", tmp_path / "missing.json")
        with pytest.raises(CheckpointError, match="the source is gone"):
            target.write_weights([("a", 8, gone)])


def test_damaged_working_directory(tmp_path):
    with directory(tmp_path / "out") as target:
        (target.partial / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"run\.json.*damaged"), directory(tmp_path / "out", resume=True):
        pass


def test_symbolic_link_as_output(tmp_path):
    """The directory behind a link is replaced, as often as wanted, and the link stays."""
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    for marker in ("new", "newer"):
        write(tmp_path / "link", marker, force=True)
        assert (tmp_path / "real" / "config.json").read_text() == marker
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    with directory(tmp_path / "real", force=True), pytest.raises(LockedError), directory(tmp_path / "link", force=True):
        pass


def test_bytes_are_kept(tmp_path):
    tensors = {
        "a": torch.tensor([1.0, float("nan"), -0.0]).to(torch.bfloat16),
        "b": torch.randn(3, 2).to(torch.float16),
        "c": torch.randn(5).to(torch.float8_e4m3fn),
        "d": torch.arange(4),
        "e": torch.tensor([True, False]),
        "f": torch.zeros(0, 3),
        "g": torch.tensor(2.5),
        "h": torch.randn(2, 3).t(),
    }
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "source" / "model.safetensors")
    source = open_checkpoint(str(tmp_path / "source"))
    with directory(tmp_path / "out") as target:
        target.store_layer("h.0", tensors, {})
        plan = [(name, entry.nbytes, partial(source.read, name)) for name, entry in source.tensors.items()]
        target.write_weights(plan, shard_bytes=20)
        target.add_text("config.json", "{}")
        stored, _ = target.layers.load("h.0")
        target.commit()
    copy = open_checkpoint(str(tmp_path / "out"))
    assert copy.tensors.keys() == source.tensors.keys() == stored.keys()
    for name, entry in source.tensors.items():
        twin = copy.tensors[name]
        assert (twin.dtype, twin.shape) == (entry.dtype, entry.shape)
        content = entry.file.read_bytes()[entry.start : entry.end]
        assert twin.file.read_bytes()[twin.start : twin.end] == content
        assert stored[name].reshape(-1).view(torch.uint8).numpy().tobytes() == content


KILLED = """
import builtins, io, os, pathlib, sys
sys.path.insert(0, {root!r})
from spmconvert.errors import OutputError
from tests.checkpoint.test_writer import convert, directory, files_of
where, force = pathlib.Path({where!r}), {force}
calls = "mkdir", "rename", "replace", "rmdir", "unlink"
# what a killed process wrote needs no fsync to stay; without it the test takes a fraction of the time
os.fsync = lambda descriptor: None

def run(point, out):
    # in a child that kills itself at its point-th change of the disk: before a call, or with a file opened and still empty
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count, plain_open = 0, open
    def step():
        nonlocal count
        if count == point:
            os.kill(os.getpid(), 9)
        count += 1
    def counted(real):
        def call(*arguments, **options):
            step()
            return real(*arguments, **options)
        return call
    def counted_open(file, mode="r", *arguments, **options):
        opened = plain_open(file, mode, *arguments, **options)
        if "w" in mode:
            step()
        return opened
    for name in calls:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = io.open = counted_open
    convert(out, "new", force=force)
    os._exit(0)

convert(where / "whole", "new")
whole, point, status, gaps = files_of(where / "whole"), 0, 9, 0
while status:
    out = where / str(point) / "out"
    if force:
        convert(out, "old")
        old = files_of(out)
    status = run(point, out)
    if out.exists():
        assert files_of(out) in ([whole, old] if force else [whole]), point
    if status and force and not out.exists():
        # between the last two renames: the next run puts the new output in place, whatever else it does
        try:
            directory(out).__enter__()
        except OutputError:
            gaps += 1
        assert files_of(out) == whole, point
    if status and not (out.exists() and files_of(out) == whole):
        # a run that was killed before it had a working directory has nothing to resume
        begun = (out.parent / ".out.partial" / "run.json").exists()
        try:
            convert(out, "new", force=force, resume=begun)
        except OutputError as error:
            assert "was complete and is in place now" in str(error), point
    assert files_of(out) == whole, point
    if status:
        convert(out, "new", force=True)
    assert [path.name for path in out.parent.iterdir()] == ["out"], point
    point += 1
assert gaps == force, gaps
print(point)
"""


def convert(path, marker, **options):
    """A run as the tool makes it: layers that are not there yet, weights in shards, files, commit."""
    with directory(path, **options) as target:
        for number in range(2):
            if target.layers.load(f"h.{number}") is None:
                target.store_layer(f"h.{number}", {"w": torch.full((4,), float(number + len(marker)))}, {})
        layers = [(f"h.{n}", 16, lambda n=n: target.layers.load(f"h.{n}")[0]["w"]) for n in range(2)]
        target.write_weights([*layers, *entries(TENSORS)], shard_bytes=32)
        target.add_text("config.json", marker)
        target.commit()


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("force", [False, True])
def test_killed_at_any_moment(tmp_path, force):
    """The old output, the new one or none: never part of one; and the run can be resumed to the same bytes."""
    code = KILLED.format(root=str(Path(__file__).parent.parent.parent), where=str(tmp_path), force=force)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_a_killed_run_does_not_keep_the_lock(tmp_path):
    code = (
        "import os; from pathlib import Path; from spmconvert.checkpoint.writer import OutputDirectory as O\n"
        f"with O(Path({str(tmp_path / 'out')!r}), fingerprint='f', force=False, resume=False, needed_bytes=1):"
        " os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert (tmp_path / ".out.lock").exists()
    with directory(tmp_path / "out", resume=True):
        pass
