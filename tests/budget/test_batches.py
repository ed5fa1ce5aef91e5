"""Candidates of a budget that are measured in batches."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

import spmconvert
from spmconvert.budget import curves
from spmconvert.budget.batches import waves_of
from spmconvert.budget.spend import Spending
from spmconvert.commands import convert as converting
from spmconvert.operator.design import Design
from tests.conftest import _save, llama_config
from tests.support import QUICK, files_of


@dataclass
class Curve:
    """What a batch asks of a layer."""

    name: str
    known: tuple[Design, ...] = ()

    @property
    def layer(self):
        return SimpleNamespace(target=SimpleNamespace(name=self.name))

    def knows(self, design):
        return design in self.known


def monarch(rank, *more, blocks_in=2):
    entry = {"kind": "monarch", "blocks_in": blocks_in, "blocks_out": 1, "rank": rank}
    return Design.from_options(32, 64, [entry, *({"kind": "lowrank", "rank": one} for one in more)])


def test_a_layer_is_in_one_batch_of_a_wave():
    a, b, c = Curve("a"), Curve("b"), Curve("c")
    plain, other = monarch(3), monarch(2, blocks_in=4)
    trials = [(a, [plain, monarch(5, 1), other]), (b, [monarch(2), monarch(4, 2)]), (c, [monarch(6, 2)])]
    waves = waves_of(trials, "cpu", 4)
    shown = [["".join(curve.name for curve, _ in batch) for batch in wave] for wave in waves]
    assert shown == [["ab"], ["abc"], ["a"]]
    # on a device without batches each is alone, and layers of their own share a wave
    assert [[len(batch) for batch in wave] for wave in waves_of(trials, "cpu")] == [[1, 1, 1], [1, 1], [1]]


def test_what_is_known_is_measured_again_only_beside_what_is_not():
    known, new, done = Curve("a", (monarch(3),)), Curve("b"), Curve("c", (monarch(2, blocks_in=4),))
    trials = [(known, [monarch(3)]), (new, [monarch(4)]), (done, [monarch(2, blocks_in=4)])]
    ((batch,),) = waves_of(trials, "cpu", 4)
    assert [curve.name for curve, _ in batch] == ["a", "b"]
    assert waves_of([(known, [monarch(3)])], "cpu", 4) == []


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose layers are wide enough for monarch."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(hidden_size=160, intermediate_size=192, num_hidden_layers=2))
    return _save(model, tmp_path_factory.mktemp("wide") / "llama")


def test_a_budget_in_batches_chooses_the_same_and_goes_on_with_what_is_known(wide, text, tmp_path, monkeypatch):
    given = {**QUICK, "calib": text, "keep": 0.5, "structures": "monarch,sparse24,lowrank", "fit.sequential": False}
    given |= {"budget.allow_slower": True, "budget.iterations": 8}
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "alone-cache"))
    alone = spmconvert.convert(wide, tmp_path / "alone", **given)
    monkeypatch.setattr(converting, "Spending", partial(Spending, batch=4))
    whole, sizes = curves.measure_together, []

    def counted(subjects):
        sizes.append(len(subjects))
        return whole(subjects)

    monkeypatch.setattr(curves, "measure_together", counted)
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    together = spmconvert.convert(wide, tmp_path / "together", **given)
    assert max(sizes) > 1
    assert [record.design for record in together.layers] == [record.design for record in alone.layers]
    assert abs(together.choice.loss / alone.choice.loss - 1) < 1e-3

    # interrupted among the members of a batch: what was measured stays as it was
    write, written = curves.write_part, []

    def interrupted(*arguments):
        if len(written) == len(together.layers) + 3:
            raise KeyboardInterrupt
        written.append(write(*arguments))

    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "other-cache"))
    with monkeypatch.context() as patch:
        patch.setattr(curves, "write_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            spmconvert.convert(wide, tmp_path / "parts", **given)
    spmconvert.convert(wide, tmp_path / "parts", resume=True, **given)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "together")
    places = (tmp_path / "cache" / "curves", tmp_path / "other-cache" / "curves")
    kept = [{file.name: file.read_bytes() for file in place.iterdir()} for place in places]
    assert kept[0] == kept[1]
