"""What is wrong with a command line before any command runs, in one line, as every other error is said.

typer draws a box around a sentence of its parser or of pydantic. Its exceptions are caught here instead and become
``OptionError``, which names the option, what was found and what to give.
"""

import re
from collections.abc import Sequence

from pydantic import ValidationError
from typer import BadParameter, TyperException

from spmconvert.errors import OptionError
from spmconvert.system.validation import complaint, shown

# what may be given in the place of an empty value; an empty --ignore takes a recipe's back
_EMPTY = {"--calib": "name a file, or none", "--data": "name a file, or leave it out for auto"}
_MAY_BE_EMPTY = ("--ignore", "--set")


def check_empty(arguments: Sequence[str]) -> None:
    """Refuse values that are empty: a variable of a shell that is not set, more often than not.

    As a path such a value would be the working directory.

    Raises:
        OptionError: when there is one.
    """
    for before, argument in zip(("", *arguments), arguments, strict=False):
        name, sign, value = argument.partition("=")
        if sign and not value.strip() and name.startswith("--"):
            option = name
        elif argument.strip():
            continue
        else:
            option = before if before.startswith("-") else "an argument"
        if option not in _MAY_BE_EMPTY:
            raise OptionError(f"{option} is empty; {_EMPTY.get(option, 'give it a value, or leave it out')}")


def usage_error(error: TyperException) -> OptionError:
    """An error of typer's parser as one of this tool."""
    name = _parameter(error)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "spmconvert"
    if isinstance(cause := error.__cause__, ValidationError):
        return OptionError(f"{name} {complaint(cause.errors()[0])}")
    match type(error).__name__:
        case "MissingParameter":
            return OptionError(f"{name} is missing; {command} --help shows what to give")
        case "NoSuchOption":
            near = getattr(error, "possibilities", None)
            remedy = f"did you mean {' or '.join(near)}?" if near else f"{command} --help lists them"
            return OptionError(f"there is no option {shown(name)}; {remedy}")
        case "BadOptionUsage":
            takes_none = "not take" in error.format_message()
            return OptionError(
                f"{name} takes no value; write it alone" if takes_none else f"{name} needs a value; write {name} VALUE"
            )
    # of words that are neither options nor their values, which the parser has in parentheses or quotes
    words = re.search(r"[('](?!s\))([^')]+)['\)]", error.format_message())
    found = f"{shown(words[1])} is not understood" if words else "the command line is not understood"
    return OptionError(f"{found}; {command} --help lists what is")


def _parameter(error: TyperException) -> str:
    """The option or argument that an error is about, as it is typed."""
    if (option := getattr(error, "option_name", None)) is not None:
        return str(option)
    parameter = getattr(error, "param", None)
    if not isinstance(error, BadParameter) or parameter is None:
        return "an argument"
    options = [name for name in parameter.opts if name.startswith("-")]
    return options[0] if options else str(parameter.name).upper()
