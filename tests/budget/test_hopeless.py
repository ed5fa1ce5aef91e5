"""Budgets that lose more than a finetune wins back: what is said, when, and whether what is named instead loses less."""

import json

import pytest

import spmconvert
from spmconvert.budget import hopeless, spend
from spmconvert.budget.allocation import Limit
from spmconvert.fit.progress import Silent
from spmconvert.recipe.recipe import Budget

# layers as small as these may be slower in any other form
QUICK = {
    "fit.iterations": 2,
    "calibration.rows": 12,
    "budget.iterations": 2,
    "structures": "lowrank",
    "fit.refine": 0,
    "allow_slower": True,
}


class Told(Silent):
    """What a conversion says of its budget, and whether its layers were known by then."""

    def __init__(self):
        self.said, self.is_planned = [], False

    def losing(self, warning):
        assert not self.is_planned, "it is said before anything is fitted"
        self.said.append(warning)

    def planned(self, _):
        self.is_planned = True


@pytest.fixture
def told(checkpoints, text, tmp_path, monkeypatch):
    """What is said of a conversion whose predicted loss may be so much."""

    def told(most, name="gpt2", **options):
        monkeypatch.setattr(hopeless, "MOST_LOST", {"logits": (most, "nats"), "hidden": (most, "of a square")})
        watch, judged = Told(), []

        def judging(curves, limit, *others):
            found = hopeless.hopeless(curves, limit, *others)
            judged.append((limit.budget, found))
            return found

        monkeypatch.setattr(spend, "hopeless", judging)
        options = {"calib": text, **QUICK, **options}
        spmconvert.convert(checkpoints[name], tmp_path / "out", progress=watch, force=True, **options)
        predicted = json.loads((tmp_path / "out" / "spm.json").read_text())["allocation"]["predicted_loss"]
        found = [(budget, one) for budget, one in judged if one is not None]
        assert watch.said == [one.describe(budget) for budget, one in found]
        return found, predicted

    return told


@pytest.mark.usefixtures("proportional")
@pytest.mark.parametrize(
    ("limit", "asked", "milder"),
    [
        ("keep", 0.2, lambda budget: 0.2 < budget.keep < 1),
        ("keep_flops", 0.2, lambda budget: 0.2 < budget.keep_flops < 1),
        ("keep_bytes", 12_000, lambda budget: budget.keep_bytes > 12_000),
        ("speedup", 2.0, lambda budget: 1 < budget.speedup < 2),
    ],
)
def test_what_is_named_instead_is_milder_and_loses_no_more_than_a_finetune_wins_back(told, limit, asked, milder):
    said, loss = told(1e9, **{limit: asked})
    assert not said, "nothing is too much"
    most = 0.6 * loss
    [(budget, found)], again = told(most, **{limit: asked})
    assert budget.limits == {limit: asked}
    assert found.loss == again == loss > found.most == most
    instead, less = found.instead
    assert milder(instead)
    assert less <= most
    said, really = told(most, **instead.limits)
    assert not said, "what was named is not too much"
    assert really == pytest.approx(less, rel=0.05)


@pytest.mark.parametrize(
    ("option", "given"), [({"speedup": 1.01}, []), ({"speedup": 1.04}, [1.01, 1.02, 1.03]), ({"keep": 0.98}, [0.99])]
)
def test_milder_budgets_are_neither_the_one_that_was_asked_for_nor_none(option, given):
    found = [next(iter(one.budget.limits.values())) for one in hopeless._milder(Limit(Budget(**option), ()))]
    assert sorted(set(found)) == given


def test_two_limits_become_milder_together():
    found = [one.budget.limits for one in hopeless._milder(Limit(Budget(speedup=1.5, keep=0.5), ()))]
    assert found[0] == {"speedup": 1.45, "keep": 0.55}
    assert found[-1] == {"speedup": 1.05, "keep": 0.95}
    # one that is as mild as its last digit allows does not hold up the other
    found = [one.budget.limits for one in hopeless._milder(Limit(Budget(speedup=1.01, keep=0.5), ()))]
    assert found[0] == {"speedup": 1.01, "keep": 0.55}
    assert all(limits["keep"] > 0.5 for limits in found)


def test_where_every_budget_loses_too_much_none_is_named(told):
    [(budget, found)], loss = told(0.0, keep=0.3)
    assert found.instead is None
    assert found.describe(budget) == (
        f"--keep 0.3 is predicted to lose {loss:.2g} nats, more than a finetune wins back (up to 0), and so is every "
        "milder one; target other layers"
    )


def test_encoders_have_a_limit_of_their_own(told):
    [(_, found)], _ = told(0.0, name="bert", keep=0.3)
    assert found.unit == "of a square"


@pytest.mark.parametrize("options", [{"sensitivity": "none"}, {"keep": None, "max_error": 0.9}])
def test_relative_errors_say_nothing_about_the_model(told, options):
    said, _ = told(0.0, **{"keep": 0.3, **options})
    assert not said


def test_classes_have_no_measured_limit():
    limit = Limit(Budget(keep=0.3), ())
    assert hopeless.hopeless(None, limit, 9.0, "classes", lambda _: None) is None


def test_the_command_warns_in_one_line_and_so_does_a_dry_run(run, checkpoints, text, tmp_path, monkeypatch):
    monkeypatch.setattr(hopeless, "MOST_LOST", {"logits": (0.0, "nats a token")})
    quick = [part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")]
    command = ["convert", checkpoints["gpt2"], "-o", tmp_path / "out", "--calib", text, "--keep", "0.3", *quick]
    code, _, err = run(*command)
    assert code == 0
    [line] = [line for line in err.splitlines() if line.startswith("warning: --keep 0.3 is predicted to lose ")]
    code, _, again = run(*command, "--dry-run")
    assert code == 0
    assert line in again.splitlines()
    code, out, _ = run(*command, "--dry-run", "--json")
    assert f"warning: {json.loads(out)['warning']}" == line


@pytest.mark.parametrize(
    ("limits", "option"),
    [
        ({"keep": 0.5}, "--keep 0.5"),
        ({"keep_flops": 0.25}, "--keep-flops 0.25"),
        ({"keep_bytes": 40_000_000}, "--keep-bytes 40000000"),
        ({"speedup": 1.15}, "--speedup 1.15"),
        ({"max_error": 0.1}, "--max-error 0.1"),
    ],
)
def test_a_budget_as_an_option(limits, option):
    assert Budget(**limits).option == option
