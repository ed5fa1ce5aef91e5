"""Candidates of a budget that are measured in batches."""

from functools import partial

import spmconvert
from spmconvert.budget import curves
from spmconvert.budget.spend import Spending
from spmconvert.commands import convert as converting
from tests.support import QUICK, files_of


def test_a_budget_in_batches_chooses_the_same_and_goes_on_with_what_is_known(checkpoints, text, tmp_path, monkeypatch):
    given = {**QUICK, "calib": text, "keep": 0.5, "structures": "monarch,sparse24,lowrank", "fit.sequential": False}
    given |= {"budget.allow_slower": True, "budget.iterations": 8}
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "alone-cache"))
    alone = spmconvert.convert(checkpoints["llama"], tmp_path / "alone", **given)
    monkeypatch.setattr(converting, "Spending", partial(Spending, batch=4))
    whole, sizes = curves.measure_together, []

    def counted(subjects):
        sizes.append(len(subjects))
        return whole(subjects)

    monkeypatch.setattr(curves, "measure_together", counted)
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    together = spmconvert.convert(checkpoints["llama"], tmp_path / "together", **given)
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
        try:
            spmconvert.convert(checkpoints["llama"], tmp_path / "parts", **given)
        except KeyboardInterrupt:
            stopped = True
    assert stopped
    spmconvert.convert(checkpoints["llama"], tmp_path / "parts", resume=True, **given)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "together")
    places = (tmp_path / "cache" / "curves", tmp_path / "other-cache" / "curves")
    kept = [{file.name: file.read_bytes() for file in place.iterdir()} for place in places]
    assert kept[0] == kept[1]

    # all is known
    sizes.clear()
    spmconvert.convert(checkpoints["llama"], tmp_path / "again", **given)
    assert not sizes
