"""The search on layers whose losses are made up: what is tried, where it goes on, and what it never does."""

from dataclasses import replace

import pytest

from spmconvert.budget.allocation import Limit, allocate
from spmconvert.budget.cache import CacheIdentity, CurveCache
from spmconvert.budget.candidates import Candidate
from spmconvert.budget.curves import Curves, LayerCurve
from spmconvert.budget.lowrank import LowRankCurve, candidate_ranks
from spmconvert.budget.search import ROUNDS, SAMPLE, Search, _is_new, spread
from spmconvert.commands.convert import open_plan, resolve_recipe
from spmconvert.errors import OptionError
from spmconvert.plan.plan import ConversionPlan
from spmconvert.system.caches import check_cache

LAYERS = 7
SIZES = (32, 128)


class Slow:
    """A machine on which designs of some kinds are slower than the dense layer."""

    def __init__(self, *kinds):
        self.kinds, self.tokens = kinds, 128

    def at(self, tokens):
        return self

    def is_slower(self, design):
        return any(term.kind in self.kinds for term in design.terms)


class World:
    """Layers of one shape, of which designs of a kind lose so many times what low rank of the same size does."""

    def __init__(self, checkpoint, factors, **changes):
        recipe = resolve_recipe(None, {"keep": 0.4, "sensitivity": "none", "structures": "spm,sparse24,lowrank", **changes})
        source, plan, _ = open_plan(str(checkpoint), recipe)
        first = next(layer for layer in plan.layers if (layer.target.in_features, layer.target.out_features) == SIZES)
        layers = tuple(replace(first, target=replace(first.target, name=f"h.{i}.c_fc")) for i in range(LAYERS))
        check_cache("curves")
        self.factors, self.tried, self.recipe = factors, [], recipe
        cache = CurveCache.of(source, recipe, CacheIdentity.of_checkpoint(source, "cpu"), None)
        ranks = tuple(candidate_ranks(*SIZES))
        losses = tuple(self.low_rank_loss(rank * sum(SIZES)) for rank in ranks)
        known = LowRankCurve(ranks, losses, losses) if "lowrank" in recipe.budget.structures else None
        plan = ConversionPlan(layers, plan.selection, plan.other_bytes)
        self.curves = Curves(plan, recipe, cache, [LayerCurve(layer, known) for layer in layers])

    @staticmethod
    def low_rank_loss(parameters):
        return 1.0 / (1.0 + parameters / 100)

    def subject(self, layer):
        world = self

        class Subject:
            def measure(self, designs):
                found = []
                for design in designs:
                    world.tried.append((layer.target.name, design))
                    factor = world.factor(layer.target.name, design)
                    loss = factor * world.low_rank_loss(design.parameter_count(bias=False))
                    found.append(Candidate(tuple(design.to_json()), loss, loss))
                return found

        return Subject()

    def factor(self, name, design):
        return self.factors.get(design.terms[0].kind, 1.0)

    def limit(self, times=None, **limits):
        budget = self.recipe.budget.model_copy(update={"allow_slower": times is None, **limits})
        return Limit(budget, self.curves.plan.layers, times)

    def run(self, times=None, **limits):
        return Search(self.curves, self.limit(times, **limits), self.measure).run()

    def measure(self, trials):
        for curve, designs in trials:
            missing = [design for design in designs if not curve.knows(design)]
            curve.terms += self.subject(curve.layer).measure(missing)

    def layers_tried(self, kind):
        return {name for name, design in self.tried if design.term(kind)}


def test_kinds_that_lose_are_tried_on_a_sample_only(checkpoints):
    world = World(checkpoints["gpt2"], {"spm": 2.0, "sparse24": 2.0})
    allocation = world.run()
    sample = {curve.layer.target.name for curve in spread(world.curves.layers, SAMPLE)}
    assert world.layers_tried("spm") == world.layers_tried("sparse24") == sample
    assert {one.kinds for one in allocation.picked if one is not None} == {("lowrank",)}


def test_kinds_that_win_go_on_to_all_layers_of_the_shape(checkpoints):
    world = World(checkpoints["gpt2"], {"spm": 0.3, "sparse24": 2.0})
    alone = allocate(world.curves, world.limit()).choice.loss
    allocation = world.run()
    assert len(world.layers_tried("spm")) == LAYERS
    assert len(world.layers_tried("sparse24")) == SAMPLE
    assert any("spm" in one.kinds for one in allocation.picked if one is not None)
    assert allocation.choice.loss < alone
    assert allocation.choice.cost <= allocation.choice.limit


def test_nothing_is_measured_twice(checkpoints):
    world = World(checkpoints["gpt2"], {"spm": 0.3, "sparse24": 0.9})
    first = world.run()
    assert len(set(world.tried)) == len(world.tried)
    world.tried.clear()
    assert world.run() == first
    assert not world.tried


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("factors", [{}, {"spm": 0.5}, {"sparse24": 0.5}, {"spm": 0.98, "sparse24": 1.5}], ids=str)
def test_a_search_is_never_worse_than_low_rank_alone_and_keeps_the_budget(checkpoints, factors, keep):
    world = World(checkpoints["gpt2"], factors)
    alone = allocate(world.curves, world.limit(keep=keep)).choice.loss
    allocation = world.run(keep=keep)
    assert allocation.choice.loss <= alone
    assert allocation.choice.cost <= allocation.choice.limit


@pytest.mark.parametrize("slow", ["spm", "sparse24"])
def test_designs_that_are_slower_than_dense_are_never_fitted(checkpoints, slow):
    world = World(checkpoints["gpt2"], {"spm": 0.3, "sparse24": 0.3})
    allocation = world.run(Slow(slow))
    assert not world.layers_tried(slow)
    assert world.tried
    assert not any(slow in one.kinds for one in allocation.picked if one is not None)


def test_what_an_earlier_run_fitted_is_dropped_where_it_is_slower(checkpoints):
    world = World(checkpoints["gpt2"], {"spm": 0.3})
    world.run()
    allocation = world.run(Slow("spm"))
    assert not any("spm" in one.kinds for one in allocation.picked if one is not None)
    dropped, known = allocation.dropped
    assert dropped == sum("spm" in one.kinds for own in world.curves.candidates for one in own) > 0
    assert known == sum(map(len, world.curves.candidates))


@pytest.mark.parametrize("structures", ["spm", "sparse24", "spm,sparse24"])
def test_without_low_rank_kinds_stand_alone(checkpoints, structures):
    world = World(checkpoints["gpt2"], {"spm": 0.5, "sparse24": 0.5}, structures=structures)
    allocation = world.run(keep=0.75)
    assert {design.terms[0].kind for _, design in world.tried} == set(structures.split(","))
    assert all(len(design.terms) == 1 for _, design in world.tried)
    assert any(allocation.picked)


def test_where_low_rank_is_slower_others_are_tried_all_the_same(checkpoints):
    world = World(checkpoints["gpt2"], {"spm": 0.5})
    allocation = world.run(Slow("lowrank"))
    assert {one.kinds for one in allocation.picked if one is not None} == {("spm",)}
    with pytest.raises(OptionError, match="all candidates are slower"):
        World(checkpoints["gpt2"], {}).run(Slow("spm", "sparse24", "lowrank"))


def test_a_choice_that_no_longer_changes_ends_the_search(checkpoints, monkeypatch):
    world, rounds = World(checkpoints["gpt2"], {"spm": 2.0, "sparse24": 2.0}), []
    monkeypatch.setattr("spmconvert.budget.search.allocate", lambda *given: rounds.append(1) or allocate(*given))
    world.run()
    assert len(rounds) == 2, "once before and once after other kinds were tried"
    rounds.clear()
    World(checkpoints["gpt2"], {"spm": 0.3, "sparse24": 0.5}).run()
    assert 2 <= len(rounds) <= ROUNDS + 2


def test_layers_of_a_sample_are_spread():
    assert spread(list("abc"), 3) == ["a", "b", "c"]
    assert spread(list("ab"), 3) == ["a", "b"]
    assert spread(list("abcdefg"), 3) == ["b", "d", "f"]
    assert spread(list("abcdefgh"), 2) == ["c", "g"]


def test_only_the_best_forms_of_a_shape_go_on(checkpoints, monkeypatch):
    monkeypatch.setattr("spmconvert.budget.search.ROUNDS", 0)
    world = World(checkpoints["gpt2"], {"spm": 0.5, "sparse24": 2.0})
    world.run()
    sample = {curve.layer.target.name for curve in spread(world.curves.layers, SAMPLE)}
    tried = {name: [other for other, _ in world.tried].count(name) for name, _ in world.tried}
    assert len(tried) == LAYERS
    assert all(count > 1 if name in sample else count == 1 for name, count in tried.items())


def test_layers_are_tried_again_where_their_cost_changed():
    assert _is_new(None, 100)
    assert _is_new(100, 110)
    assert not _is_new(100, 103)
