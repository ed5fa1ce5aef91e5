"""``spmconvert eval``: lm-evaluation-harness on a converted checkpoint, with its own options."""

from pathlib import Path
from typing import Annotated, Any

import typer

# from the first word that is no option of ours on, everything is the harness's, its --help included
PASSED_ON: dict[str, Any] = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DIR OPTION",
            help="Converted checkpoint, without one the only one in the working directory; then options of lm_eval, "
            "such as --tasks hellaswag --batch_size 8.",
        ),
    ] = None,
) -> None:
    """Run lm-evaluation-harness (lm_eval) on a converted checkpoint, which it does not load by itself."""
    from spmconvert.checkpoint.converted import only_converted
    from spmconvert.reporting.harness import run_command_line

    given = list(arguments or [])
    directory = only_converted(Path.cwd()) if not given or given[0].startswith("-") else Path(given.pop(0))
    run_command_line(directory, given)
