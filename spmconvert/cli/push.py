"""``spmconvert push``: a converted checkpoint on the Hugging Face hub."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spmconvert.cli import console
from spmconvert.units import size


def push(
    directory: Annotated[Path, typer.Argument(help="Converted checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Id on the hub: NAME or OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Only the owner sees it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made where it is not there. Default the main one.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Upload a converted checkpoint to the Hugging Face hub, in one commit."""
    from spmconvert.commands.push import push as run

    pushed = run(directory, repository, private=private, revision=revision, message=message)
    if as_json:
        console.data(asdict(pushed))
    else:
        console.note(f"pushed {pushed.files} files, {size(pushed.bytes)}")
        console.show(pushed.url)
