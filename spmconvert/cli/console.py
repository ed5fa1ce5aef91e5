"""The only module that prints: tables, progress and errors of the command line.

Results go to standard output; progress, notes and errors go to standard error, so that ``--json`` can be piped.
"""

import json
import logging
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from spmconvert.escaping import visible


class _Visible(Console):
    """A console that shows what would move its cursor or change its colours: the text of everything goes through here."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does; what rich itself sends to the terminal is in segments of another kind, or no text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


# a pipe or a file has no width; wide enough that no name is folded
# names and paths may hold brackets and colons, which are not markup
out = _Visible(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
err = _Visible(stderr=True, highlight=False, markup=False, emoji=False)


def error(message: str) -> None:
    """Print one error line."""
    err.print(Text.assemble(("error: ", "bold red"), " ".join(message.split())), soft_wrap=True)


def note(message: str) -> None:
    """Print one line that is not part of the result."""
    err.print(Text(message), soft_wrap=True)


def data(value: Any) -> None:
    """Print a result as JSON."""
    out.out(json.dumps(value, indent=2), highlight=False)


def silence_libraries() -> None:
    """Turn off the progress bars of transformers, which would break into ours, and news of what nobody here can change.

    Of weights that stay on disk, and of kernels that torchao has for other machines: transformers imports it where it is.
    """
    for name in ("accelerate.big_modeling", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def show(renderable: RenderableType) -> None:
    """Print a result that another module has laid out."""
    out.print(renderable)
