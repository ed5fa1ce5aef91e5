"""Who is fitted together, and that it stays so when a run goes on from another one."""

import json
from functools import partial

import pytest
import torch

import spmconvert
from spmconvert.checkpoint.reader import open_checkpoint
from spmconvert.commands import convert as converting
from spmconvert.fit import batches, stored
from spmconvert.fit.batches import in_batches, member_bytes, members_that_fit, power_of_two
from spmconvert.fit.stored import FitRun
from spmconvert.operator.design import Design
from tests.support import QUICK, files_of, raw_tensors

STAGES, MONARCH = {"kind": "spm"}, {"kind": "monarch", "blocks_in": 2, "blocks_out": 1, "rank": 3}
ALONE = {"fit.sequential": False, "fit.refine": 0}


def design(*entries, sizes=(32, 64)):
    return Design.from_options(*sizes, list(entries))


def low_rank(rank):
    return {"kind": "lowrank", "rank": rank}


def test_layers_of_one_shape_and_the_same_free_terms_are_together():
    items = [
        ("a", design(STAGES)),
        ("b", design(STAGES, sizes=(64, 32))),
        ("c", design(MONARCH, low_rank(3))),
        ("d", design(STAGES)),
        ("e", design({**MONARCH, "rank": 2}, low_rank(9))),
        ("f", design(MONARCH)),
        ("g", design(low_rank(3))),
        ("h", design(low_rank(3))),
        ("i", design(STAGES)),
    ]
    found = in_batches(items, lambda item: item[1], "cpu", 2)
    assert ["".join(name for name, _ in batch) for batch in found] == ["ad", "b", "ce", "f", "g", "h", "i"]
    found = in_batches(items, lambda item: item[1], "cpu")
    assert ["".join(name for name, _ in batch) for batch in found] == list("abcdefghi")


def test_a_device_has_room_for_a_power_of_two(monkeypatch):
    one = design(STAGES)
    for free, members in ((0.5, 1), (1.9, 1), (3.9, 2), (9.0, 8), (1000.0, batches.MOST_MEMBERS)):
        given = int(free * member_bytes(one) / batches.MEMORY_SHARE) + 1
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, given=given: (given, 10 * given))
        assert members_that_fit(one, "cuda:1") == members
        assert members_that_fit(one, "cpu") == 1
    assert [power_of_two(number) for number in (0, 1, 2, 3, 4, 31)] == [1, 1, 2, 2, 4, 16]


def in_fours(patch):
    patch.setattr(converting, "FitRun", partial(FitRun, batch=4))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rank": 3, **ALONE}),
        # experts of a block, which follow no other layer, and are refined with their block
        ("mixtral", {"stages": 3, "fit.refine": 1}),
    ],
)
def test_a_conversion_in_batches_is_close_to_one_without_and_resumes_to_its_bytes(
    checkpoints, text, tmp_path, monkeypatch, name, changes
):
    given = {**QUICK, "calib": text, **changes}
    spmconvert.convert(checkpoints[name], tmp_path / "alone", **given)
    in_fours(monkeypatch)
    together, sizes = stored.fit_layers, []

    def counted(layers, **options):
        sizes.append(len(layers))
        return together(layers, **options)

    monkeypatch.setattr(stored, "fit_layers", counted)
    spmconvert.convert(checkpoints[name], tmp_path / "whole", **given)
    assert max(sizes) > 1
    alone, whole = (raw_tensors(tmp_path / place) for place in ("alone", "whole"))
    assert alone.keys() == whole.keys()
    for key, (dtype, content) in alone.items():
        first, second = (torch.frombuffer(bytearray(one), dtype=torch.float32) for one in (content, whole[key][1]))
        assert dtype == "F32"
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    _interrupt_and_resume(checkpoints[name], tmp_path / "parts", monkeypatch, given)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def _interrupt_and_resume(source, place, monkeypatch, given):
    """Stop in the midst of a batch, and go on where there is room for another number of members."""
    store, done = stored._store, []

    def interrupted(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(store(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(stored, "_store", interrupted)
        with pytest.raises(KeyboardInterrupt):
            spmconvert.convert(source, place, **given)
    kept = json.loads((place.with_name(f".{place.name}.partial") / "batches.json").read_text())
    assert any(len(batch) > 1 for batch in kept)
    with monkeypatch.context() as patch:
        patch.setattr(converting, "FitRun", partial(FitRun, batch=2))
        spmconvert.convert(source, place, resume=True, **given)


def test_a_batch_of_one_process_is_a_batch_of_another(checkpoints, text, tmp_path, monkeypatch):
    """Shares are whole batches, so that who works on them changes nothing."""
    in_fours(monkeypatch)
    shares = []
    fit_together = stored.fit_together

    class Pair:
        """Both members of a team of two, one after the other."""

        def __init__(self, team):
            self._team = team

        def __getattr__(self, name):
            return getattr(self._team, name)

        def share(self, items):
            found = [*items[0::2], *items[1::2]]
            if items and isinstance(items[0], list):
                shares.append((items[0::2], items[1::2]))
            return found

    given = {**QUICK, "calib": text, "rank": 3, **ALONE}
    spmconvert.convert(checkpoints["llama"], tmp_path / "one", **given)
    join = converting.join_team
    monkeypatch.setattr(converting, "join_team", lambda device: (Pair(join(device)[0]), device))
    spmconvert.convert(checkpoints["llama"], tmp_path / "two", **given)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert fit_together is stored.fit_together
    assert any(first and second for first, second in shares)


def test_without_batches_nothing_is_kept_of_them(checkpoints, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stored, "fit_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        spmconvert.convert(checkpoints["gpt2"], tmp_path / "out", calib=None, stages=3, **ALONE, **{"fit.iterations": 4})
    assert not (tmp_path / ".out.partial" / "batches.json").exists()
    assert open_checkpoint(str(checkpoints["gpt2"])).tensors
