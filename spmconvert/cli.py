"""The command line: parse, call one library function, print its result.

Options and recipes are checked before torch is imported. Every error is one line with its own exit code, see ``errors``.
"""

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from spmconvert import console
from spmconvert.errors import INTERRUPTED_EXIT_CODE, OptionError, SpmconvertError
from spmconvert.processes import run_in_processes
from spmconvert.recipe import Recipe, parse_assignment, recipe_from_keywords, training_from_keywords
from spmconvert.version import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Replace dense layers of pretrained models by near-linear Stagewise Pairwise Mixers.",
)


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    try:
        app()
    except SpmconvertError as error:
        console.error(str(error))
        raise SystemExit(error.exit_code) from None


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"spmconvert {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Accept the options that belong to no command."""


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Hub id or local directory of a safetensors checkpoint.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write; default NAME-spm.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="Presets mlp, attn, all; globs; re: patterns; comma-separated. Default mlp.")
    ] = None,
    ignore: Annotated[str | None, typer.Option(help="Globs and re: patterns to leave alone, comma-separated.")] = None,
    layers: Annotated[str | None, typer.Option(help="Only these blocks, for example 4-10,-1.")] = None,
    stages: Annotated[int | None, typer.Option(help="Stages a layer; default one pass over all strides.")] = None,
    variant: Annotated[str | None, typer.Option(help="general or rotation.")] = None,
    block: Annotated[int | None, typer.Option(help="Coordinates a block; 1 is the plain operator.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank companion; default 0.")] = None,
    calib: Annotated[
        str | None, typer.Option(help="Text file (.txt, .jsonl) whose activations weight the fit, or none.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe; options replace single values of it.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe, repeatable.")] = None,
    device: Annotated[str, typer.Option(help="Device of the calibration run and the fits.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="dtype of the new layers: auto, float32, bfloat16, float16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of starts and calibration rows; default 0.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would happen; touch nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Replace dense layers of MODEL by SPM layers, fit them, and write a checkpoint."""
    if resume and dry_run:
        raise OptionError("--resume and --dry-run contradict each other; a dry run writes nothing to resume")
    given = {
        **dict(parse_assignment(text) for text in set_ or []),
        **_given(targets=targets, ignore=ignore, layers=layers, stages=stages, variant=variant, block=block),
        **_given(rank=rank, dtype=dtype, seed=seed),
        **({} if calib is None else {"calib": None if calib == "none" else calib}),
    }
    resolved = recipe_from_keywords(given, recipe)
    if dry_run:
        _dry_run(model, resolved, output, as_json)
    else:
        _convert(model, resolved, output, device, resume, force, as_json)


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _dry_run(model: str, recipe: Recipe, output: Path | None, as_json: bool) -> None:
    from spmconvert.conversion import default_output, open_plan

    _, plan, _ = open_plan(model, recipe)
    destination = str(output or default_output(model))
    if as_json:
        calibrated = recipe.calibration.file is not None
        console.data(
            {
                "output": destination,
                "layers": console.plan_rows(plan),
                "left_alone": [asdict(skipped) for skipped in plan.selection.skipped],
                "output_bytes": plan.output_bytes,
                "predicted_seconds": plan.predicted_seconds(recipe),
                "predicted_memory_bytes": plan.predicted_memory(calibrated=calibrated),
                "recipe": recipe.model_dump(mode="json", exclude={"finetune"}),
            }
        )
    else:
        console.show_plan(plan, recipe, destination)


def _convert(
    model: str, recipe: Recipe, output: Path | None, device: str, resume: bool, force: bool, as_json: bool
) -> None:
    from spmconvert.conversion import convert as run

    began = time.monotonic()
    if recipe.calibration.file is None:
        console.note("no calibration text: layers are fitted in the Frobenius norm, which is far worse; give --calib FILE")
    console.silence_libraries()
    try:
        with console.ConversionProgress() as progress:
            conversion = run(model, output, recipe=recipe, device=device, resume=resume, force=force, progress=progress)
    except KeyboardInterrupt:
        console.note("interrupted; finished layers are kept. Continue with the same command and --resume")
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    if as_json:
        console.data({**asdict(conversion), "output": str(conversion.output), "measured_on": conversion.measured_on})
    else:
        console.show_conversion(conversion, began)


@app.command()
def finetune(
    directory: Annotated[
        Path | None, typer.Argument(help="Converted checkpoint; default the only one in the working directory.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text (.txt, .jsonl, .parquet, datasets:ID[:CONFIG[:SPLIT]]) or processor tensors (.safetensors)."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write; default NAME-ft.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The dense source, where it is not where it was.")] = None,
    teacher_device: Annotated[str | None, typer.Option(help="Device of the teacher; default the student's.")] = None,
    store_logits: Annotated[
        Path | None, typer.Option(help="Only write the teacher's likeliest words there, for --teacher-logits.")
    ] = None,
    teacher_logits: Annotated[Path | None, typer.Option(help="Stored words that take the teacher's place.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the SPM layers.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step, over all processes.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens a row.")] = None,
    train: Annotated[str | None, typer.Option(help="spm layers only, with all norms and biases, or all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the split and of the order of rows.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe with a table finetune.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of that table, repeatable.")] = None,
    device: Annotated[str, typer.Option(help="Device of the student.")] = "cpu",
    num_processes: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    shard: Annotated[bool, typer.Option("--shard", help="Split the model over the processes (FSDP2).")] = False,
    tracker: Annotated[str | None, typer.Option(help="tensorboard, wandb, trackio, ...")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace DIRECTORY by the result.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Distil a converted checkpoint against the dense one it came from."""
    if data is None:
        raise OptionError("no training data is given; name a text with --data")
    options = _given(steps=steps, learning_rate=lr, batch_size=batch_size, block_size=block_size, train=train, seed=seed)
    training = training_from_keywords({**dict(parse_assignment(text) for text in set_ or []), **options}, recipe)
    if num_processes > 1 and "RANK" not in os.environ:
        raise SystemExit(run_in_processes(sys.argv[1:], num_processes))
    from spmconvert.checkpoint.converted import only_converted
    from spmconvert.finetuning import finetune as run
    from spmconvert.finetuning import store_teacher_logits

    chosen = directory or only_converted(Path.cwd())
    console.silence_libraries()
    began = time.monotonic()
    try:
        if store_logits is not None:
            with console.StepProgress("storing logits") as progress:
                store_teacher_logits(
                    chosen, store_logits, data=data, recipe=training, teacher=teacher, device=device, report=progress.update
                )
            console.note(f"next: the same command with --teacher-logits {store_logits} in place of --store-logits")
            return
        with console.TrainingProgress(training.steps) as watch:
            result = run(
                chosen,
                output,
                data=data,
                recipe=training,
                teacher=teacher,
                teacher_logits=teacher_logits,
                teacher_device=teacher_device,
                device=device,
                shard=shard,
                tracker=tracker,
                in_place=in_place,
                force=force,
                resume=resume,
                report=watch.show,
            )
    except KeyboardInterrupt:
        console.note("interrupted; the last checkpoint is kept. Continue with the same command and --resume")
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    if result is not None and as_json:
        console.data({**asdict(result), "output": str(result.output)})
    elif result is not None:
        console.show_finetuned(result, time.monotonic() - began)
