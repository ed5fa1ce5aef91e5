"""``convert --dry-run``: what a conversion would do, from headers and from measurements that earlier runs have left."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from spmconvert.cli import console, views
from spmconvert.errors import OptionError
from spmconvert.recipe.recipe import Recipe

NOT_MEASURED = (
    "designs for a budget follow from measurements that have not been made yet; run the command once without --dry-run, "
    "then a dry run shows any budget"
)


def dry_run_of(
    model: str, recipe: Recipe, output: Path | None, device: str, *, speedups: Sequence[float] = (), as_json: bool
) -> None:
    """Print the layers, designs, sizes and times of a conversion, and what other budgets would buy; touch nothing."""
    from spmconvert.budget.allocation import choice_record, describe_choice
    from spmconvert.commands.bare import first_budget
    from spmconvert.commands.convert import default_output, open_plan
    from spmconvert.data.calibration import with_inputs
    from spmconvert.data.documents import content_hash, read_documents
    from spmconvert.data.media import TENSOR_SUFFIX
    from spmconvert.outputs.objective import objective_for

    source, plan, config = open_plan(model, recipe)
    recipe, _ = with_inputs(recipe, source, config, device, None, [layer.target.name for layer in plan.layers])
    recipe = recipe.model_copy(update={"budget": first_budget(recipe, config) or recipe.budget})
    file, text = recipe.calibration.file, None
    if file is not None:
        text = content_hash(file, None if file.suffix == TENSOR_SUFFIX else read_documents(file))
    choice = budgets = note = lost = None
    if recipe.budget.limits:
        allocation, budgets, lost = _budgets(source, plan, recipe, device, text, speedups, objective_for(config))
        plan, choice = allocation.plan, allocation.choice
        note = describe_choice(allocation, recipe.budget)
    destination = str(output or default_output(model))
    if as_json:
        calibrated = recipe.calibration.file is not None
        console.data(
            {
                "output": destination,
                "layers": views.plan_rows(plan),
                "left_alone": [asdict(skipped) for skipped in plan.selection.skipped],
                "output_bytes": plan.output_bytes,
                "predicted_seconds": plan.predicted_seconds(recipe),
                "predicted_memory_bytes": plan.predicted_memory(calibrated=calibrated),
                "allocation": choice and choice_record(choice, recipe.budget),
                "budgets": budgets,
                "warning": lost and lost.describe(recipe.budget),
                "recipe": recipe.model_dump(mode="json", exclude={"finetune"}),
            }
        )
    else:
        views.show_plan(plan, recipe, destination)
        if note is not None:
            views.show_spent(note)
        if lost is not None:
            console.note(f"warning: {lost.describe(recipe.budget)}")
        if budgets is not None:
            views.show_budgets(budgets, recipe.budget.loss_name)


def _budgets(
    source: Any, plan: Any, recipe: Recipe, device: str, text: str | None, speedups: Sequence[float], objective: Any
) -> tuple[Any, Any, Any]:
    """What is chosen for the recipe's budget, what others would buy, and whether it loses too much, from what is known."""
    from spmconvert.budget.allocation import allocate, compare_budgets
    from spmconvert.budget.cache import CacheIdentity
    from spmconvert.budget.curves import check_measurable, read_curves
    from spmconvert.budget.hopeless import hopeless
    from spmconvert.budget.spend import compare_speedups, limit_of, timed_limit

    check_measurable(recipe)
    identity = CacheIdentity.of_checkpoint(source, device)
    curves = read_curves(source, plan, recipe, identity, text)
    limit = limit_of(recipe.budget, plan, device, identity)
    if curves is None:
        raise OptionError(NOT_MEASURED)
    if recipe.budget.speedup is not None:
        budgets = compare_speedups(curves, limit, source, sorted({recipe.budget.speedup, *speedups}))
        timed = timed_limit(limit, source)
        if budgets is None or timed is None:
            raise OptionError(NOT_MEASURED)
        limit = timed
    else:
        # a largest error has curves of its own, by which no share is chosen
        budgets = None if recipe.budget.max_error is not None else compare_budgets(curves, limit)
    allocation = allocate(curves, limit)
    lost = hopeless(curves, limit, allocation.choice.loss, objective, partial(timed_limit, source=source))
    return allocation, budgets, lost
