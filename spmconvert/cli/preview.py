"""``convert --dry-run``: what a conversion would do, from headers and from curves that earlier runs have left."""

from dataclasses import asdict
from pathlib import Path

from spmconvert.cli import console, views
from spmconvert.errors import OptionError
from spmconvert.recipe.recipe import Recipe


def dry_run_of(model: str, recipe: Recipe, output: Path | None, device: str, *, as_json: bool) -> None:
    """Print the layers, designs, sizes and times of a conversion, and what other budgets would buy; touch nothing."""
    from spmconvert.budget.allocation import allocate, choice_record, compare_budgets, describe_choice
    from spmconvert.budget.cache import CacheIdentity
    from spmconvert.budget.curves import check_measurable, read_curves
    from spmconvert.commands.convert import default_output, open_plan
    from spmconvert.data.documents import content_hash, read_documents

    source, plan, _ = open_plan(model, recipe)
    text = None
    if recipe.calibration.file is not None:
        text = content_hash(recipe.calibration.file, read_documents(recipe.calibration.file))
    choice = budgets = None
    if recipe.budget.limits:
        check_measurable(recipe)
        curves = read_curves(source, plan, recipe, CacheIdentity.of_checkpoint(source, device), text)
        if curves is None:
            raise OptionError(
                "designs for a budget follow from measurements that have not been made yet; run the command once without "
                "--dry-run, then a dry run shows any budget"
            )
        allocation = allocate(curves, recipe.budget)
        plan, choice = allocation.plan, allocation.choice
        # a largest error has curves of its own, by which no share is chosen
        budgets = None if recipe.budget.max_error is not None else compare_budgets(curves)
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
                "recipe": recipe.model_dump(mode="json", exclude={"finetune"}),
            }
        )
    else:
        views.show_plan(plan, recipe, destination)
        if choice is not None:
            views.show_spent(describe_choice(choice, recipe.budget))
        if budgets is not None:
            views.show_budgets(budgets, recipe.budget.loss_name)
