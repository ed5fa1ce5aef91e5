"""The conversion: read a checkpoint, gather statistics, fit every target, write an ordinary checkpoint.

Read top to bottom: ``convert`` is the whole of it. Finished layers are stored one by one in a working directory beside the
output, so a run can be interrupted anywhere and resumed to the same bytes; the output appears by one rename at the end.

Several processes divide calibration rows, candidates and fits of layers that follow no other; fits in sequence and
refinement are made by the first one. The output is the same, byte for byte, where each computes with as many threads.
"""

import hashlib
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spmconvert.budget.allocation import check_reachable, describe_choice
from spmconvert.budget.cache import CacheIdentity
from spmconvert.budget.curves import check_measurable
from spmconvert.budget.speed import forward_seconds
from spmconvert.budget.spend import Spending, Spent, limit_of
from spmconvert.calibrate.moments import gather_moments
from spmconvert.calibrate.store import MomentStore, moment_bytes
from spmconvert.checkpoint.places import CHOICE_FILE, check_apart, check_output
from spmconvert.checkpoint.reader import Checkpoint, open_checkpoint
from spmconvert.checkpoint.writer import OutputDirectory
from spmconvert.commands.bare import SECOND_BUDGET, first_budget
from spmconvert.commands.conversion import Conversion, output_tensors, write_conversion
from spmconvert.data.calibration import CalibrationRows, calibration_rows, with_inputs
from spmconvert.data.tokens import tokenizer_hash
from spmconvert.errors import OptionError, OutOfReachError
from spmconvert.fit.blocks import refined
from spmconvert.fit.layer import LayerRecord
from spmconvert.fit.progress import Progress, Silent
from spmconvert.fit.refine import REFINEMENT_EPOCHS
from spmconvert.fit.run import fit_all, fit_share, is_finished
from spmconvert.fit.stored import FitRun, chain_of, dense_tensors, stored_layer
from spmconvert.fit.streams import layer_blocks, no_chain, on_one_path
from spmconvert.model.architecture import load_config, skeleton
from spmconvert.model.loading import DenseModel
from spmconvert.model.opened import as_stored, opened
from spmconvert.model.opening import open_
from spmconvert.model.swap import as_it_runs, copy_sharing_tensors, replace_module, stack_
from spmconvert.outputs.objective import objective_for
from spmconvert.plan.plan import ConversionPlan, plan_conversion
from spmconvert.recipe.loading import recipe_from_keywords
from spmconvert.recipe.recipe import Recipe
from spmconvert.system.devices import check_device
from spmconvert.system.team import Team, join_team
from spmconvert.system.timing import device_name
from spmconvert.version import __version__

# of a model that would have been refined
UNREFINED = "no block was refined, since the targets are on no path through one list of blocks"
# of a model that could not be walked block by block
WHOLE = "the whole model was in memory, since the targets are in no chain of blocks"


def convert(
    model: str | Path,
    output: str | Path | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    bare: bool = False,
    progress: Progress | None = None,
    **changes: Any,
) -> Conversion:
    """Convert a checkpoint.

    Args:
        model: local directory or hub id.
        output: directory to write; None for the model's name with ``-spm`` in the working directory.
        recipe: a recipe, or the path of one; None for the defaults.
        device: where the calibration run and the fits happen.
        force: replace an output that exists.
        resume: continue an interrupted run of the same conversion.
        bare: choose designs for a budget of time where the recipe names neither designs nor a budget, and has a text.
        progress: told how it gets on.
        **changes: recipe keys, as ``SPMConfig`` takes them: ``targets="mlp"``, ``stages=11``, ``calib="text.txt"``.

    Returns:
        Where the output is, and what it cost and kept; the same in all of several processes.

    Raises:
        SpmconvertError: see ``spmconvert.errors`` for the kinds.
    """
    resolved = resolve_recipe(recipe, changes)
    check_device(device)
    team, device = join_team(device)
    listener = progress if progress is not None and team.leads else Silent()
    named_recipe = None if recipe is None or isinstance(recipe, Recipe) else Path(recipe)
    # fresh layers draw parameters before they get those that were fitted; nobody's random numbers are to depend on that
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return _convert(str(model), output, resolved, named_recipe, device, force, resume, bare, listener, team)


def _convert(
    model: str,
    output: str | Path | None,
    resolved: Recipe,
    named_recipe: Path | None,
    device: str,
    force: bool,
    resume: bool,
    bare: bool,
    listener: Progress,
    team: Team,
) -> Conversion:
    source, plan, config = open_plan(model, resolved)
    destination = default_output(model) if output is None else Path(output)
    check_apart(
        destination,
        {"source": source.directory, "calibration text": resolved.calibration.file, "recipe": named_recipe},
    )
    check_output(Path(os.path.realpath(destination)), force=force)
    # a text that the model writes itself is written once
    if not team.leads:
        team.wait()
    names = [layer.target.name for layer in plan.layers]
    resolved, standing_in = with_inputs(resolved, source, config, device, listener.calibrating, names)
    if team.leads:
        team.wait()
    listener.reading(resolved, standing_in)
    bare = bare and not resolved.names_designs
    if bare and (budget := first_budget(resolved, config)) is not None:
        listener.taking(budget)
        resolved = resolved.model_copy(update={"budget": budget})
    rows = calibration_rows(source.directory, config, resolved, names)
    width = max(layer.target.in_features for layer in plan.layers)
    if rows is not None and rows.fitted_tokens is not None and rows.fitted_tokens < width:
        listener.reading_few(rows.fitted_tokens, width)
    budgeted = bool(resolved.budget.limits)
    if budgeted:
        check_measurable(resolved)
        check_reachable(limit_of(resolved.budget, plan, device, CacheIdentity.of_checkpoint(source, device)))
    dense = DenseModel(source.directory, config, device, destination.absolute().parent)
    given, resolved = resolved, _settle(resolved, plan, rows, dense)
    # a budget is spent later; until then the output may be as large as the source
    needed = plan.other_bytes + sum(layer.dense_bytes for layer in plan.layers) if budgeted else plan.output_bytes
    needed += 0 if rows is None else moment_bytes(plan.layers)
    fingerprint = _fingerprint(source, resolved, rows)
    directory = OutputDirectory(destination, fingerprint=fingerprint, force=force, resume=resume, needed_bytes=needed)
    with directory if team.leads else nullcontext(directory) as target:
        # until the first process has set it up
        team.wait()
        moments = None if rows is None else MomentStore(target.partial / "moments")
        run = FitRun(source, dense, plan, resolved, rows, moments, target, listener, team)
        spending = _spending(run) if budgeted else None
        work: dict[str, Callable[[Any], None]] = {"moments": lambda _: _gather(run), "fits": partial(fit_share, run)}
        work |= {} if spending is None else spending.work
        if not team.leads:
            team.follow(work)
            conversion = team.same(None)
            assert isinstance(conversion, Conversion)
            return conversion
        with team.led(work) as together:
            if not _is_fitted(run):
                together("moments", None)
            spent = None if spending is None else _choose(run, replace(spending, together=together), bare=bare)
            # fits that follow no block let it go
            whole = dense.is_whole
            listener.planned(run.plan)
            records = fit_all(run, together)
        listener.writing(run.plan.output_bytes)
        conversion = _summary(run, destination, records, spent)
        unrefined = given.fit.refine is None and given.prefers_refinement and not resolved.fit.refine
        conversion = _with_notes(conversion, UNREFINED * unrefined)
        write_conversion(run, conversion)
    # of this run, and not of the output, which is the same where an interrupted run had gathered everything
    conversion = _with_notes(conversion, WHOLE * whole)
    team.same(conversion)
    return conversion


def _gather(run: FitRun) -> None:
    """Gather what calibration rows say about the layers, where there are rows."""
    if run.rows is None or run.moments is None:
        return
    gather_moments(
        run.dense,
        run.plan.layers,
        run.rows,
        run.moments,
        run.progress.calibrating,
        chain=run.chain,
        weighted=run.recipe.weights_fits or run.recipe.predicts_loss,
        seed=run.recipe.seed,
        team=run.team,
    )


def _with_notes(conversion: Conversion, *notes: str) -> Conversion:
    return replace(conversion, fit_note="; ".join(filter(None, (conversion.fit_note, *notes))))


def _is_fitted(run: FitRun) -> bool:
    """Whether all layers were finished by a run that this one goes on from."""
    chosen = run.target.load_file(CHOICE_FILE)
    if run.recipe.budget.limits and chosen is None:
        return False
    plan = run.plan if chosen is None else Spent.from_json(run.plan, chosen).allocation.plan
    return is_finished(replace(run, plan=plan))


def _spending(run: FitRun) -> Spending:
    """What the designs of a run are chosen from."""
    return Spending(
        source=run.source,
        plan=run.plan,
        recipe=run.recipe,
        identity=CacheIdentity.of_checkpoint(run.source, run.dense.device),
        rows=run.rows,
        objective=objective_for(run.dense.config),
        model=run.dense.lent,
        chain=run.chain,
        moments=lambda name: None if run.moments is None else run.moments.read(name),
        weights=partial(dense_tensors, run),
        device=run.dense.device,
        watch=run.progress,
        team=run.team,
    )


def _choose(run: FitRun, spending: Spending, *, bare: bool) -> Spent:
    """Choose the designs of a run, or take what it chose before it was interrupted; its plan has them afterwards.

    Where nobody named a budget and the first one is out of reach, the second one is spent; the run's recipe has it then.
    """
    chosen_before = run.target.load_file(CHOICE_FILE)
    if chosen_before is None:
        try:
            spent = spending.choose()
        except OutOfReachError:
            if not bare:
                raise
            run.progress.taking(SECOND_BUDGET)
            second = run.recipe.model_copy(update={"budget": SECOND_BUDGET})
            spent = replace(replace(spending, recipe=second).choose(), instead=True)
        # finished layers have these designs, whatever a cache says when the run is resumed
        run.target.store_file(CHOICE_FILE, spent.to_json())
    else:
        spent = Spent.from_json(run.plan, chosen_before)
    if spent.instead:
        run.recipe = run.recipe.model_copy(update={"budget": SECOND_BUDGET})
    run.plan = spent.allocation.plan
    return spent


def open_plan(model: str, recipe: Recipe) -> tuple[Checkpoint, ConversionPlan, Any]:
    """Open a checkpoint and plan its conversion; headers and config only.

    Returns:
        The checkpoint, the plan, and the model's config.

    Raises:
        SpmconvertError: as for ``convert``.
    """
    source = open_checkpoint(model)
    # what cannot be carried over is refused before any work
    source.companion_files()
    config = load_config(source.directory)
    architecture = skeleton(config)
    open_(architecture)
    source = opened(source, architecture)
    plan = plan_conversion(source, architecture, recipe)
    if recipe.fit.follows_blocks:
        layer_blocks(architecture, [layer.target.name for layer in plan.layers])
    return source, plan, config


def _settle(recipe: Recipe, plan: ConversionPlan, rows: CalibrationRows | None, dense: DenseModel) -> Recipe:
    """The recipe with what it leaves open about the fits decided, so that it is recorded as it was done.

    Whether blocks are a chain is seen by running them, where fits in sequence or refinement are wanted.

    Raises:
        OptionError: when they are asked for and cannot be made; before anything is measured for a budget.
    """
    fit = recipe.fit
    wanted = {
        "sequential": recipe.prefers_sequence if fit.sequential is None else fit.sequential,
        "refine": (REFINEMENT_EPOCHS if recipe.prefers_refinement else 0) if fit.refine is None else fit.refine,
    }
    if all(layer.target.group for layer in plan.layers):
        if fit.sequential:
            raise OptionError(
                "fits in sequence need layers that see the same tokens in both models, and all targets are experts; choose "
                "--independent"
            )
        wanted["sequential"] = False
    if any(wanted.values()) and not _can_follow_blocks(recipe, plan, rows, dense):
        wanted = {"sequential": False, "refine": 0}
    settled = {"output_weighting": recipe.weights_fits, **wanted}
    calibration = recipe.calibration
    if calibration.file is not None and not calibration.is_dataset:
        # a relative path would mean another place to the commands that come later
        calibration = calibration.model_copy(update={"file": calibration.file.resolve()})
    return recipe.model_copy(update={"fit": recipe.fit.model_copy(update=settled), "calibration": calibration})


def _can_follow_blocks(recipe: Recipe, plan: ConversionPlan, rows: CalibrationRows | None, dense: DenseModel) -> bool:
    """Whether the targets are on one path through a chain of blocks.

    Raises:
        OptionError: when they are not, and the recipe asks for what needs it.
    """
    names, model = [layer.target.name for layer in plan.layers], skeleton(dense.config)
    if rows is None or not (recipe.fit.follows_blocks or on_one_path(model, names)):
        return False
    container, _ = layer_blocks(model, names)
    if chain_of(dense, plan, rows) is not None:
        return True
    if recipe.fit.follows_blocks:
        raise no_chain(container)
    return False


def default_output(model: str) -> Path:
    """``<name>-spm`` in the working directory, for a directory or a hub id."""
    return Path(f"{Path(model).resolve().name if Path(model).exists() else model.rpartition('/')[2]}-spm")


def resolve_recipe(recipe: Recipe | str | Path | None, changes: dict[str, Any]) -> Recipe:
    """A recipe from its path or from the defaults, with single keys replaced.

    Raises:
        RecipeError: when it does not parse or a key is unknown.
        OptionError: when a finished recipe and changes are both given.
    """
    if isinstance(recipe, Recipe):
        if changes:
            raise OptionError(f"a Recipe and {', '.join(changes)} are both given; change the recipe instead")
        return recipe
    return recipe_from_keywords(changes, None if recipe is None else Path(recipe))


def _fingerprint(source: Checkpoint, recipe: Recipe, rows: CalibrationRows | None) -> str:
    """Everything that decides about the bytes of the output."""
    parts = (
        source.sha256(),
        recipe.model_dump_json(exclude={"calibration": {"file"}, "finetune": True}),
        "" if rows is None else rows.file_sha256,
        "" if rows is None else tokenizer_hash(source.directory),
        __version__,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _summary(run: FitRun, output: Path, records: tuple[LayerRecord, ...], spent: Spent | None) -> Conversion:
    entries = as_stored(run.source).tensors.values()
    before = sum(math.prod(entry.shape) for entry in entries)
    saved = sum(record.dense_parameters - record.parameters for record in records)
    max_error = run.recipe.budget.max_error or math.inf
    choice = None if spent is None else spent.allocation.choice
    return Conversion(
        output=output,
        layers=records,
        parameters_before=before,
        parameters_after=before - saved,
        bytes_before=sum(entry.nbytes for entry in entries),
        bytes_after=sum(size for _, size, _ in output_tensors(run, refined(run))),
        fitted_rows=0 if run.rows is None else len(run.rows.fitted),
        choosing_rows=0 if run.rows is None else len(run.rows.choosing),
        held_out_rows=0 if run.rows is None else len(run.rows.held_out),
        choice=choice,
        left_dense=0 if choice is None else len(choice.chosen) - len(records),
        budget_note="" if spent is None else describe_choice(spent.allocation, run.recipe.budget),
        fit_note=run.recipe.fit.fit_note,
        above_limit=tuple(record.name for record in records if record.error > max_error),
        speed=None if spent is None or spent.predicted_speedup is None else _measured_speed(run, spent),
    )


def _measured_speed(run: FitRun, spent: Spent) -> dict[str, Any]:
    """How much faster the fitted model is, beside what was predicted."""
    dense, budget = run.dense.lent(), run.recipe.budget
    converted = copy_sharing_tensors(dense)
    for layer in run.plan.layers:
        built = stored_layer(run, layer).to(run.dense.device, dense.dtype)
        replace_module(converted, layer.target.name, built.eval().requires_grad_(False))
    stack_(converted)
    times = forward_seconds({"dense": as_it_runs(dense), "converted": converted}, budget, run.dense.device)
    return {
        "rows": budget.rows,
        "tokens": budget.tokens,
        "device": device_name(run.dense.device),
        "wanted": budget.speedup,
        "predicted": spent.predicted_speedup,
        "measured": times["dense"] / times["converted"],
    }
