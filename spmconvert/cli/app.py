"""The command line: parse, call one library function, print its result.

Options and recipes are checked before torch is imported. Every error is one line with its own exit code, see ``errors``.
"""

import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from spmconvert.checkpoint.places import RUN_FILE, partial_directory
from spmconvert.cli import console, progress, views
from spmconvert.cli.evaluate import PASSED_ON, evaluate
from spmconvert.cli.outcome import show_outcome
from spmconvert.cli.panels import PanelCommand
from spmconvert.cli.preview import dry_run_of
from spmconvert.cli.processes import run_in_processes
from spmconvert.cli.push import push
from spmconvert.cli.usage import check_empty, usage_error
from spmconvert.errors import INTERRUPTED_EXIT_CODE, OptionError, SpmconvertError, VerificationError
from spmconvert.recipe.loading import parse_assignment, recipe_from_keywords, training_from_keywords
from spmconvert.recipe.recipe import AUTO_TEXT, Recipe, Training
from spmconvert.system.interrupts import LINE, at_work
from spmconvert.system.team import is_alone, is_first
from spmconvert.version import __version__

MEASURE = typer.Option("--measure/--no-measure", help="End with the whole model's size, speed and quality.")
PROCESSES = typer.Option(min=1, help="Processes on this machine.")

app = typer.Typer(
    add_completion=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    help="Replace dense layers of pretrained models by near-linear Stagewise Pairwise Mixers.",
)


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    try:
        check_empty(sys.argv[1:])
        # a number where a command ended early, as after --help; None where it ran through
        code = app(standalone_mode=False)
    except SpmconvertError as error:
        console.error(str(error))
        raise SystemExit(error.exit_code) from None
    except typer.TyperException as error:
        refused = usage_error(error)
        console.error(str(refused))
        raise SystemExit(refused.exit_code) from None
    if code == INTERRUPTED_EXIT_CODE:
        console.note("interrupted; run the command again")
    raise SystemExit(code or 0)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"spmconvert {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Show the help where no command is named; accept the options that belong to none."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(OptionError.exit_code)


@app.command(cls=PanelCommand)
def convert(
    model: Annotated[str, typer.Argument(help="Hub id or local directory of a safetensors checkpoint.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write; default NAME-spm.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Presets mlp, attn, all; globs; re: patterns; of one tower as in text:mlp; comma-separated. Default mlp."
        ),
    ] = None,
    ignore: Annotated[str | None, typer.Option(help="Globs and re: patterns to leave alone, comma-separated.")] = None,
    layers: Annotated[str | None, typer.Option(help="Only these blocks, for example 4-10,-1.")] = None,
    stages: Annotated[int | None, typer.Option(help="Stages a layer; default one pass over all strides.")] = None,
    variant: Annotated[str | None, typer.Option(help="general or rotation.")] = None,
    block: Annotated[int | None, typer.Option(help="Coordinates a block; 1 is the plain operator.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank term; default 0.")] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the targeted parameters to keep; chooses the design of every layer.")
    ] = None,
    keep_bytes: Annotated[str | None, typer.Option(help="The same as a size of these layers, for example 40MB.")] = None,
    keep_flops: Annotated[float | None, typer.Option(help="The same as a share of their FLOPs a token.")] = None,
    speedup: Annotated[
        str | None,
        typer.Option(
            help="How many times faster the whole model has to be on DEVICE, alone or beside a size; a list with --dry-run."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens a row of the forward pass that is timed; default 512.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of that pass; default 1.")] = None,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="Let a budget build layers that are slower than the dense ones.")
    ] = False,
    max_error: Annotated[float | None, typer.Option(help="Smallest designs with at most this held-out error.")] = None,
    sensitivity: Annotated[
        str | None, typer.Option(help="What layers' errors cost a budget: gradient (default), kl or none.")
    ] = None,
    structures: Annotated[
        str | None,
        typer.Option(help="Kinds of terms that a budget may build with: spm, monarch, blockdense, sparse24, lowrank."),
    ] = None,
    sequential: Annotated[
        bool | None, typer.Option("--sequential/--independent", help="Fit layers on what converted ones feed them.")
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(help="Passes that train each block as a whole after its fits; 0 for none."),
    ] = None,
    new_bias: Annotated[
        bool, typer.Option("--new-bias", help="Give layers a bias where the dense ones have none; exports refuse it.")
    ] = False,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Text (.txt, .jsonl, .parquet, datasets:ID), folder of pictures or .wav files, or processor tensors "
            "(.safetensors) that weights the fit, or none; default auto, what every machine has or the model writes itself."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe; options replace single values of it.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe, repeatable.")] = None,
    device: Annotated[str, typer.Option(help="Device of the calibration run and the fits.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="dtype of the new layers: auto, float32, bfloat16, float16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of starts and calibration rows; default 0.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would happen; touch nothing.")] = False,
    num_processes: Annotated[int, PROCESSES] = 1,
    measure: Annotated[bool, MEASURE] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Replace dense layers of MODEL by SPM layers, fit them, and write a checkpoint."""
    if resume and dry_run:
        raise OptionError("--resume and --dry-run contradict each other; a dry run writes nothing to resume")
    speedups = _speedups(speedup, dry_run=dry_run)
    given = {
        **dict(parse_assignment(text) for text in set_ or []),
        **_given(targets=targets, ignore=ignore, layers=layers, stages=stages, variant=variant, block=block),
        **_given(rank=rank, dtype=dtype, seed=seed, sensitivity=sensitivity, structures=structures),
        **_given(keep=keep, keep_bytes=keep_bytes, keep_flops=keep_flops, max_error=max_error, sequential=sequential),
        **_given(refine=refine, new_bias=new_bias or None),
        **_given(tokens=tokens, rows=rows, speedup=speedups[0] if speedups else None, allow_slower=allow_slower or None),
        **({} if calib is None else {"calib": None if calib == "none" else calib}),
    }
    resolved = recipe_from_keywords(given, recipe, text=AUTO_TEXT)
    if dry_run:
        dry_run_of(model, resolved, output, device, speedups=speedups, as_json=as_json)
    else:
        _start_processes(num_processes)
        _convert(model, resolved, output, device, resume, force, as_json, measure=measure)


def _start_processes(count: int) -> None:
    """Have several processes do what this one was started for, where it is not one of them."""
    if count > 1 and "RANK" not in os.environ:
        raise SystemExit(run_in_processes(sys.argv[1:], count))


def _speedups(text: str | None, *, dry_run: bool) -> list[float]:
    """The numbers that ``--speedup`` names."""
    parts = [] if text is None else text.split(",")
    try:
        speedups = [float(part) for part in parts]
    except ValueError:
        raise OptionError(f"--speedup {text!r} is no number; write for example --speedup 1.5") from None
    if len(speedups) > 1 and not dry_run:
        raise OptionError(
            f"--speedup {text} names {len(speedups)} values; a conversion has one, --dry-run compares several"
        )
    return speedups


def _say_interrupted(output: Path, kept: str) -> None:
    """Say what an interrupted run has left, and what that is good for."""
    if (partial_directory(Path(os.path.realpath(output))) / RUN_FILE).is_file():
        console.note(f"interrupted; {kept}. Continue with the same command and --resume")
    else:
        console.note(LINE)


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _convert(
    model: str,
    recipe: Recipe,
    output: Path | None,
    device: str,
    resume: bool,
    force: bool,
    as_json: bool,
    *,
    measure: bool,
) -> None:
    from spmconvert.commands.convert import convert as run
    from spmconvert.commands.convert import default_output

    began = time.monotonic()
    console.silence_libraries()
    try:
        with at_work(), progress.ConversionProgress() as watch:
            conversion = run(
                model, output, recipe=recipe, device=device, resume=resume, force=force, bare=True, progress=watch
            )
    except KeyboardInterrupt:
        _say_interrupted(output or default_output(model), "finished layers are kept")
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    if not is_first():
        return
    if not as_json:
        views.show_conversion(conversion, began)
    found: dict[str, Any] = {}
    if measure:
        data = recipe.calibration.file or AUTO_TEXT
        found = show_outcome(conversion.output, data, device, dense_bytes=conversion.bytes_before, as_json=as_json)
    if as_json:
        own = {"output": str(conversion.output), "measured_on": conversion.measured_on}
        console.data({**asdict(conversion), **own, **found})
    else:
        views.show_next(conversion.output)


def _data_that_stands_in(directory: Path, teacher: str | None, device: str, *, may_write: bool) -> str:
    """What a finetune takes for the data that it was not given; says so in the first process.

    Args:
        directory: the converted checkpoint.
        teacher: its source, where it is not where it was.
        device: where that may write.
        may_write: whether it may.
    """
    from spmconvert.checkpoint.converted import open_converted, open_source
    from spmconvert.data.standin import stand_in, written_stand_in
    from spmconvert.model.architecture import load_config

    converted = open_converted(directory)
    config = load_config(converted.directory)
    found = None
    if may_write:
        with progress.StepProgress("the dense model writes rows to train on") as watch:
            found = written_stand_in(
                "training", open_source(converted, teacher), config, converted.layers, device, watch.update
            )
    found = found or stand_in("training", directory, config, converted.layers)
    if found is None:
        return AUTO_TEXT
    if is_first():
        console.note(f"trained on {found.what}; {found.better}, --data")
    return str(found.file)


@app.command(cls=PanelCommand)
def finetune(
    directory: Annotated[
        Path | None, typer.Argument(help="Converted checkpoint; default the only one in the working directory.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Text (.txt, .jsonl, .parquet, datasets:ID[:CONFIG[:SPLIT]]), folder of pictures or .wav files, or "
            "processor tensors (.safetensors); auto for what every machine has."
        ),
    ] = AUTO_TEXT,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write; default NAME-ft.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The dense source, where it is not where it was.")] = None,
    teacher_device: Annotated[str | None, typer.Option(help="Device of the teacher; default the student's.")] = None,
    store_logits: Annotated[
        Path | None, typer.Option(help="Only write the teacher's likeliest words there, for --teacher-logits.")
    ] = None,
    teacher_logits: Annotated[Path | None, typer.Option(help="Stored words that take the teacher's place.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps; without it and --minutes 1000 (4000 of 4 rows) in 15 minutes at most."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time that the steps may take; alone, as many steps as it allows.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of the SPM layers; default one that follows from what was kept.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step, over all processes.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens a row.")] = None,
    train: Annotated[
        str | None, typer.Option(help="spm layers only, with all norms, or all, as of encoders by itself.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the split and of the order of rows.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe with a table finetune.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of that table, repeatable.")] = None,
    device: Annotated[str, typer.Option(help="Device of the student.")] = "cpu",
    num_processes: Annotated[int, PROCESSES] = 1,
    shard: Annotated[bool, typer.Option("--shard", help="Split the model over the processes (FSDP2).")] = False,
    tracker: Annotated[str | None, typer.Option(help="tensorboard, wandb, trackio, ...")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace DIRECTORY by the result.")] = False,
    measure: Annotated[bool, MEASURE] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Distil a converted checkpoint against the dense one it came from."""
    options = _given(steps=steps, minutes=minutes, learning_rate=lr, batch_size=batch_size, block_size=block_size)
    options |= _given(train=train, seed=seed)
    training = training_from_keywords({**dict(parse_assignment(text) for text in set_ or []), **options}, recipe)
    _start_processes(num_processes)
    from spmconvert.checkpoint.converted import only_converted
    from spmconvert.commands.finetune import finetune as run
    from spmconvert.commands.finetune import finetuned_output

    chosen = directory or only_converted(Path.cwd(), finetuned=False)
    console.silence_libraries()
    if data == AUTO_TEXT:
        # what several processes write each, or another machine has stored logits for, need not be the same
        may_write = is_alone() and not (store_logits or teacher_logits)
        with at_work():
            data = _data_that_stands_in(chosen, teacher, device, may_write=may_write)
    began = time.monotonic()
    where = {"teacher": teacher, "teacher_logits": teacher_logits, "teacher_device": teacher_device, "device": device}
    how = {"shard": shard, "tracker": tracker, "in_place": in_place, "force": force, "resume": resume}
    if store_logits is not None:
        with at_work():
            _store_logits(chosen, store_logits, data, training, teacher, device)
        return console.data({"output": str(store_logits)}) if as_json else None
    try:
        with at_work(), progress.TrainingProgress(training.most_steps) as watch:
            result = run(chosen, output, data=data, recipe=training, report=watch.show, **where, **how)
    except KeyboardInterrupt:
        _say_interrupted(finetuned_output(chosen, output, in_place=in_place), "the last checkpoint is kept")
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    if result is None:
        return None
    if not as_json:
        views.show_finetuned(result, time.monotonic() - began)
    found: dict[str, Any] = {}
    if measure:
        total = sum(file.stat().st_size for file in result.output.glob("*.safetensors"))
        found = show_outcome(result.output, AUTO_TEXT, device, dense_bytes=total, as_json=as_json)
    return console.data({**asdict(result), "output": str(result.output), **found}) if as_json else None


def _store_logits(
    directory: Path, destination: Path, data: str, training: Training, teacher: str | None, device: str
) -> None:
    from spmconvert.commands.finetune import store_teacher_logits

    with progress.StepProgress("storing logits") as watch:
        store_teacher_logits(
            directory, destination, data=data, recipe=training, teacher=teacher, device=device, report=watch.update
        )
    console.note(f"next: the same command with --teacher-logits {shlex.quote(str(destination))} in place of --store-logits")


@app.command(cls=PanelCommand)
def report(
    models: Annotated[
        list[Path] | None, typer.Argument(help="Converted checkpoints; without one, the only one in the working directory.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for the files; default the checkpoint itself.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Text, folder of pictures or .wav files, or processor tensors to measure quality on, neither fitted nor "
            "trained on, or none; auto for what every machine has."
        ),
    ] = AUTO_TEXT,
    other_data: Annotated[Path | None, typer.Option(help="A second text, of another domain.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Another place of the dense source.")] = None,
    calib: Annotated[Path | None, typer.Option(help="Another place of the calibration text, for --baselines.")] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Measure whitened SVD and 2:4 beside it, refined as it was, and int8 of the dense model.",
        ),
    ] = False,
    int8: Annotated[
        bool | None,
        typer.Option("--int8/--no-int8", help="Whether int8 is among the baselines; default where torchao is installed."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave the refinement of the baselines out.")] = False,
    tasks: Annotated[str | None, typer.Option(help="lm-evaluation-harness tasks, comma-separated.")] = None,
    rows: Annotated[int, typer.Option(help="Most rows of a text that are measured.")] = 64,
    seconds: Annotated[float, typer.Option(help="About how long one timing takes; 0 measures no time and memory.")] = 2.0,
    device: Annotated[str, typer.Option(help="Device the models run on.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure what a conversion gained and lost; write report.json, report.html and the model card."""
    from spmconvert.checkpoint.converted import only_converted
    from spmconvert.checkpoint.unfinished import find_unfinished

    directories = models or [only_converted(Path.cwd())]
    unfinished = find_unfinished(directories[0]) if len(directories) == 1 else None
    if unfinished is not None:
        from spmconvert.reporting.terminal import unfinished_view

        if as_json:
            return console.data({**asdict(unfinished), "output": str(unfinished.output)})
        return console.show(unfinished_view(unfinished))
    from spmconvert.commands.report import report as run
    from spmconvert.reporting.files import COMPARISON_DIRECTORY, check_place, write_comparison, write_report
    from spmconvert.reporting.terminal import comparison_view, report_view

    check_place(directories[0] if len(directories) == 1 else Path(COMPARISON_DIRECTORY), output)
    names = tuple(name.strip() for name in tasks.split(",")) if tasks else ()
    console.silence_libraries()
    with at_work(), progress.Steps() as steps:
        reports = [
            run(
                directory,
                data=None if data == "none" else data,
                other_data=other_data,
                teacher=teacher,
                calibration=calib,
                baselines=baselines,
                quick=quick,
                int8=int8,
                tasks=names,
                rows=rows,
                seconds=seconds,
                device=device,
                progress=steps,
            )
            for directory in directories
        ]
    single = len(reports) == 1
    page = write_report(reports[0], directories[0], output) if single else write_comparison(reports, output)
    if as_json:
        listed = [each.model_dump(mode="json") for each in reports]
        return console.data(listed[0] if single else listed)
    console.show(report_view(reports[0]) if single else comparison_view(reports))
    return console.note(f"wrote {page}")


@app.command(cls=PanelCommand)
def verify(
    model: Annotated[
        Path | None, typer.Argument(help="Converted checkpoint; without one, the only one in the working directory.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Another place of the dense source.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check hashes, shapes, values and untouched tensors of a converted checkpoint, and load it in a fresh process."""
    from spmconvert.checkpoint.converted import only_converted
    from spmconvert.commands.verify import verify as run

    directory = model or only_converted(Path.cwd())
    with at_work():
        checks = run(directory, teacher=teacher)
    if as_json:
        console.data([asdict(check) for check in checks])
    else:
        for check in checks:
            console.show(f"{check.outcome:8}{check.name:20}{check.detail}")
    failed = [check.name for check in checks if check.outcome == "FAILED"]
    if failed:
        raise VerificationError(
            f"{directory} failed {len(failed)} of {len(checks)} checks: {', '.join(failed)}; convert again"
        )


@app.command(cls=PanelCommand)
def export(
    model: Annotated[
        Path | None, typer.Argument(help="Converted checkpoint; without one, the only one in the working directory.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write; default NAME-FORMAT.")] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="dense: plain matrices, for any runtime; portable: the same weights with their code, for "
            "trust_remote_code; onnx; torch: an ExportedProgram.",
        ),
    ] = "dense",
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write what runs without spmconvert and computes the same: a dense or portable checkpoint, or a graph."""
    from spmconvert.checkpoint.converted import only_converted
    from spmconvert.commands.export import export as run

    directory = model or only_converted(Path.cwd())
    console.silence_libraries()
    with at_work():
        result = run(directory, output, form=form, force=force)
    if as_json:
        console.data({**asdict(result), "output": str(result.output)})
    else:
        views.show_export(result)


app.command(cls=PanelCommand)(push)
app.command(name="eval", cls=PanelCommand, context_settings=PASSED_ON)(evaluate)


@app.command(cls=PanelCommand)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for texts, checkpoints and report.")] = Path(
        "spm-demo"
    ),
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of the finetune; default as many as a minute allows.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoints of an earlier demo.")] = False,
) -> None:
    """Convert, finetune and report on a real sentence encoder, without network; the extra demo has the model."""
    from spmconvert.commands.demo import demo as run
    from spmconvert.reporting.schema import read_report
    from spmconvert.reporting.terminal import report_view

    console.silence_libraries()
    with at_work():
        page = run(output, force=force, step=console.note, **_given(steps=steps))
    console.show(report_view(read_report(page.with_suffix(".json"))))
    console.show(f"open {page} in a browser")
