"""Which tile is chosen, with a clock that is told what to show; needs no GPU."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from spmconvert.errors import BackendError
from spmconvert.operator.triton import tiles, tuning
from spmconvert.operator.triton.tiles import Pass, Tile

pytest.importorskip("triton")
PASS = Pass(64, 64, 64, 64, 1)
H100 = tuning.Device("NVIDIA H100 80GB HBM3", 132, 227 * 1024)


class Clock:
    """Stands in for a device: counts what is timed, and finds the candidate of the given place the fastest."""

    def __init__(self, fastest):
        self.fastest, self.timed, self.captures, self.device = fastest, [], False, H100

    def milliseconds(self, device, run):
        self.timed.append(run())
        return 1.0 if len(self.timed) % 100 == self.fastest + 1 else 2.0

    def choose(self, tokens=256, kernel="mix", dtype=torch.bfloat16, **constants):
        self.timed.clear()
        x = SimpleNamespace(
            device=torch.device("cuda", 0), shape=(tokens, 4096), dtype=dtype, element_size=lambda: dtype.itemsize
        )
        return tuning.choose(kernel, (PASS,), x, {"PASS": tuple(PASS), **constants}, lambda found: found)


@pytest.fixture
def clock(tmp_path, monkeypatch):
    clock = Clock(fastest=1)
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_describe", lambda device: clock.device)
    monkeypatch.setattr(tuning, "_captures", lambda device: clock.captures)
    monkeypatch.setattr(tuning, "_milliseconds", clock.milliseconds)
    return clock


def files(tmp_path):
    return list(tmp_path.rglob("*"))[1:]


def test_the_fastest_is_chosen_once(clock, tmp_path):
    options = tiles.candidates("mix", [PASS], 2)
    assert len(options) > 1
    assert clock.choose() == options[1]
    assert clock.timed == options
    assert clock.choose() == options[1]
    assert not clock.timed
    (file,) = files(tmp_path)
    assert json.loads(file.read_text())["milliseconds"] == [2.0, 1.0, *[2.0] * (len(options) - 2)]


def test_the_file_serves_the_next_process(clock):
    chosen = clock.choose()
    tuning._chosen.clear()
    clock.fastest = 0
    assert clock.choose() == chosen
    assert not clock.timed


CHANGES = {
    "kernel": {"kernel": "gradient"},
    "dtype": {"dtype": torch.float32},
    "tokens": {"tokens": 257},
    "constant": {"SOURCE": 5},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_problem_is_timed_again(clock, change, tmp_path):
    clock.choose()
    clock.choose(**CHANGES[change])
    assert clock.timed
    assert len(files(tmp_path)) == 2


def test_another_device_source_or_version_is_timed_again(clock, tmp_path, monkeypatch):
    import triton

    clock.choose()
    changes = [
        lambda: setattr(clock, "device", H100._replace(name="NVIDIA H100 PCIe")),
        lambda: monkeypatch.setattr(tuning, "_source_hash", lambda: "another"),
        lambda: monkeypatch.setattr(triton, "__version__", "99"),
        lambda: monkeypatch.setattr(torch, "__version__", "99"),
    ]
    for number, change in enumerate(changes, start=2):
        change()
        tuning._chosen.clear()
        clock.choose()
        assert clock.timed
        assert len(files(tmp_path)) == number


def test_numbers_of_tokens_share_a_choice():
    assert [tuning.token_range(n) for n in (1, 2, 4, 5, 16, 17, 64, 65, 4096, 4097, 10**6)] == [
        *(1, 4, 4, 16, 16, 64, 64, 256, 4096, 16384, 16384)
    ]


def test_nothing_is_timed_while_a_graph_is_captured(clock, tmp_path):
    options = tiles.candidates("mix", [PASS], 2)
    clock.captures = True
    assert clock.choose() == options[0]
    assert not clock.timed
    assert not files(tmp_path)
    # what was taken for want of a clock is not remembered
    clock.captures = False
    assert clock.choose() == options[1]
    # and what is known holds in a capture, be it in memory or on disk
    clock.captures = True
    assert clock.choose() == options[1]
    tuning._chosen.clear()
    assert clock.choose() == options[1]
    assert not clock.timed


def test_candidates_without_room_are_left_out(clock):
    options = tiles.candidates("mix", [PASS], 2)
    needed = sorted({1024 * option[0].shared for option in options})
    assert len(needed) > 1
    clock.device = H100._replace(shared_memory=needed[-1] - 1)
    clock.choose()
    assert clock.timed == [option for option in options if 1024 * option[0].shared < needed[-1]]
    tuning._chosen.clear()
    clock.device = H100._replace(shared_memory=needed[0] - 1)
    with pytest.raises(BackendError, match=f"needs {needed[0]} bytes of shared memory, the device has {needed[0] - 1}"):
        clock.choose()


def test_candidates_that_a_small_pass_makes_equal_are_one(clock, monkeypatch, tmp_path):
    entry = tiles._CANDIDATES["mix", True, 2][0]
    monkeypatch.setitem(tiles._CANDIDATES, ("mix", True, 2), (entry, entry._replace(columns=2 * entry.columns)))
    assert len(tiles.candidates("mix", [PASS], 2)) == 1
    assert len(tiles.candidates("mix", [PASS._replace(columns=256)], 2)) == 2
    # and one needs no clock
    clock.choose()
    assert not clock.timed
    assert not files(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tiles": []}'])
def test_a_damaged_file_is_made_again(clock, content, tmp_path):
    chosen = clock.choose()
    (file,) = files(tmp_path)
    file.write_text(content)
    tuning._chosen.clear()
    assert clock.choose() == chosen
    assert clock.timed
    assert json.loads(file.read_text())["milliseconds"]


def test_a_file_appears_whole_or_not_at_all(clock, tmp_path, monkeypatch):
    written = []

    def replace(temporary, file):
        written.append(json.loads(temporary.read_text()))
        assert not file.exists()
        raise OSError("killed here")

    monkeypatch.setattr("pathlib.Path.replace", replace)
    with pytest.warns(UserWarning, match="killed here"):
        clock.choose()
    assert written
    assert not list(tmp_path.rglob("*.json"))


def test_a_cache_that_cannot_be_written_is_told(clock, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set SPMCONVERT_CACHE"):
        chosen = clock.choose()
    assert chosen == tiles.candidates("mix", [PASS], 2)[1]
    assert clock.choose() == chosen


def test_candidates_that_do_not_compile_lose(clock, monkeypatch):
    from triton import testing
    from triton.runtime.errors import OutOfResources, PTXASError

    # the real clock, with Triton's own one stubbed
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    failures = iter([OutOfResources(1, 0, "shared memory"), PTXASError("too large")])

    def fail(*_, **__):
        raise next(failures)

    monkeypatch.setattr(testing, "do_bench", fail)
    assert [tuning._milliseconds(torch.device("cuda", 0), print) for _ in range(2)] == [math.inf, math.inf]
    monkeypatch.setattr(testing, "do_bench", lambda run, **_: run())
    assert tuning._milliseconds(torch.device("cuda", 0), lambda: 0.5) == 0.5


def test_no_tile_that_runs_is_an_error(clock, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_milliseconds", lambda device, run: math.inf)
    with pytest.raises(BackendError, match="kernel mix has no tile that runs on NVIDIA H100"):
        clock.choose()
    assert not files(tmp_path)


def test_without_a_gpu_nothing_is_timed(clock):
    x = torch.empty(256, 4096)
    assert tuning.choose("mix", (PASS,), x, {}, pytest.fail) == tiles.candidates("mix", [PASS], 4)[0]


def test_nothing_is_timed_at_import():
    code = """
import triton.testing
triton.testing.do_bench = None
from triton.runtime import driver
driver.set_active(None)
from spmconvert.operator.triton import kernels, launches, merge as merge_ops, mix as triton_ops, tuning
from spmconvert.operator import linear
assert not tuning._chosen
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_candidates_are_few_and_pairs_belong_together():
    for (kernel, interleaved, itemsize), entries in tiles._CANDIDATES.items():
        assert 1 <= len(entries) <= 4
        other = tiles._CANDIDATES[kernel, not interleaved, itemsize]
        if kernel == "fused":
            alike = [(tile.tokens, tile.warps, tile.stages) for tile in entries]
            assert alike == [(tile.tokens, tile.warps, tile.stages) for tile in other]
        assert all(isinstance(tile, Tile) for tile in entries)
