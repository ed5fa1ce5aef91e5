"""Times of layers with made-up clocks: ratios, interpolation, what is kept, and what counts as slower."""

import pytest
import torch

from spmconvert.budget import times
from spmconvert.budget.times import TIE, TimeTable, timed_ranks
from spmconvert.operator.design import Design, staged_design
from spmconvert.operator.linear import SPMLinear

SIZES = (64, 96)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that calls are said to take, by design or ("dense", sizes); and all calls that were timed."""
    timed = []

    def seconds(call):
        if call[0] == "dense":
            return 1.0
        return call[1].parameter_count(bias=False) / 1000

    def run(self, calls):
        timed.append(dict(calls))
        # this run is half as fast as the first one was, and one call was held up
        slowness = 1.0 if set(calls) == {"dense"} else 2.0
        return {name: [slowness * seconds(call), slowness * seconds(call), 100.0] for name, call in calls.items()}

    monkeypatch.setattr(TimeTable, "_dense_call", lambda self, *sizes: ("dense", sizes))
    monkeypatch.setattr(TimeTable, "_design_call", lambda self, design: ("design", design))
    monkeypatch.setattr(TimeTable, "_timed", run)
    return timed


def test_a_design_is_timed_beside_the_dense_layer(clock):
    table, design = TimeTable(512), staged_design(*SIZES, 3)
    assert table.dense(*SIZES) == 1.0
    # in a run in which the dense layer took twice as long, so did the design
    assert table.seconds(design) == pytest.approx(design.parameter_count(bias=False) / 1000)
    assert [set(calls) for calls in clock] == [{"dense"}, {"dense", "design"}]
    assert table.seconds(design) == TimeTable(512).seconds(design)
    assert len(clock) == 2, "what was measured is kept"


@pytest.mark.parametrize("other", [{"tokens": 1}, {"dtype": torch.bfloat16}], ids=str)
def test_other_circumstances_have_times_of_their_own(clock, other):
    TimeTable(512).dense(*SIZES)
    TimeTable(**{"tokens": 512, **other}).dense(*SIZES)
    assert len(clock) == 2
    TimeTable(512).dense(*SIZES)
    assert len(clock) == 2


def test_low_rank_is_timed_at_a_few_ranks_and_interpolated(clock):
    table = TimeTable(512)
    ranks = timed_ranks(*SIZES)
    found = [table.seconds(staged_design(*SIZES, 0, rank=rank)) for rank in range(1, 65)]
    measured = {calls["design"][1].terms[0].rank for calls in clock if "design" in calls}
    assert measured == set(ranks)
    for rank, seconds in enumerate(found, start=1):
        # made-up times are proportional to the rank, so what lies between is exact; below the least nothing is known
        assert seconds == pytest.approx(max(rank, ranks[0]) * sum(SIZES) / 1000)


@pytest.mark.parametrize("sizes", [(1, 5), (3, 64), (64, 96), (768, 3072), (4096, 11008)], ids=str)
def test_timed_ranks(sizes):
    ranks = timed_ranks(*sizes)
    assert ranks == sorted(set(ranks))
    assert ranks[0] >= 1
    assert ranks[-1] in (min(sizes), min(sizes) - min(sizes) % 8)
    assert all(rank <= 8 or rank % 8 == 0 for rank in ranks)


def test_what_a_cpu_runs_as_one_dense_product_takes_the_same_time(clock):
    design = Design.from_options(*SIZES, [{"kind": "sparse24"}, {"kind": "lowrank", "rank": 3}])
    table = TimeTable(512)
    assert table.seconds(design) == table.dense(*SIZES)
    assert not table.is_slower(design)
    assert len(clock) == 1


def test_slower_is_what_takes_longer_than_two_runs_differ(monkeypatch, clock):
    table = TimeTable(512)
    for seconds, slower in ((0.5, False), (1.0, False), (1 + 0.9 * TIE, False), (1 + 1.1 * TIE, True), (3.0, True)):
        monkeypatch.setattr(table, "seconds", lambda _, seconds=seconds: seconds)
        assert table.is_slower(staged_design(*SIZES, 3)) == slower


def test_damaged_times_are_measured_again(clock):
    table = TimeTable(512)
    table.dense(*SIZES)
    table._file.write_text("{")
    assert TimeTable(512).dense(*SIZES) == 1.0
    assert len(clock) == 2


def test_the_time_of_a_model_is_kept(clock):
    assert TimeTable(512).of_model("a" * 64, 4) is None
    TimeTable(512).keep_model("a" * 64, 4, 2.5, 1.5)
    assert TimeTable(512).of_model("a" * 64, 4) == (2.5, 1.5)
    assert TimeTable(512).of_model("a" * 64, 5) is None
    assert TimeTable(128).of_model("a" * 64, 4) is None


@pytest.mark.parametrize("tokens", [1, 64])
def test_for_few_tokens_copies_are_called_in_turn(tokens):
    table = TimeTable(tokens)
    for call in (table._dense_call(16, 24), table._design_call(staged_design(16, 24, 2))):
        outputs = [call() for _ in range(2 * times.MOST_COPIES)]
        assert {y.shape for y in outputs} == {(1, tokens, 24)}
        assert not any(y.requires_grad for y in outputs)
        distinct = len({tuple(y.flatten().tolist()) for y in outputs})
        assert distinct == (times.MOST_COPIES if tokens == 1 else 1)
        assert torch.equal(outputs[0], outputs[times.MOST_COPIES])


def test_layers_that_are_timed_are_those_that_are_used(monkeypatch):
    built = []
    monkeypatch.setattr(TimeTable, "_call", lambda self, build, *sizes: built.append(build()))
    design = Design.from_options(16, 24, [{"kind": "spm"}, {"kind": "lowrank", "rank": 2}])
    table = TimeTable(8, dtype=torch.bfloat16)
    table._design_call(design)
    table._dense_call(16, 24)
    assert isinstance(built[0], SPMLinear)
    assert built[0].design == design
    assert isinstance(built[1], torch.nn.Linear)
    assert {parameter.dtype for layer in built for parameter in layer.parameters()} == {torch.bfloat16}
