"""What pydantic finds wrong with a value, in the words of this tool: what it is not, and what to give.

Recipes, options, provenance and reports are all checked by pydantic, whose own sentences name its types and come without a
remedy. They are said here, once for all of them. A kind of error that the table does not have is called not understood,
which says less, so ``KNOWN`` has what the models of this package can raise.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# longest piece of a value that is shown
SHOWN = 60
# by the kind of error: what the value is not, and what to give; names in braces are pydantic's own limits
KNOWN = {
    "missing": ("is missing", "name it"),
    "greater_than": ("is not above {gt}", "give a number above {gt}"),
    "greater_than_equal": ("is below {ge}", "give a number from {ge} on"),
    "less_than": ("is not below {lt}", "give a number below {lt}"),
    "less_than_equal": ("is above {le}", "give a number of at most {le}"),
    "finite_number": ("is not finite", "give a finite number"),
    "int_type": ("is no whole number", "give one, such as 4"),
    "int_parsing": ("is no whole number", "give one, such as 4"),
    "int_from_float": ("is no whole number", "give one, such as 4"),
    "int_parsing_size": ("has too many digits", "give a smaller number"),
    "float_type": ("is no number", "give one, such as 0.25"),
    "float_parsing": ("is no number", "give one, such as 0.25"),
    "bool_type": ("is neither true nor false", "give one of them"),
    "bool_parsing": ("is neither true nor false", "give one of them"),
    "string_type": ("is no text", "give one, in quotes"),
    "path_type": ("is no path", "give the name of a file"),
    "literal_error": ("is unknown", "choose among {expected}"),
    "too_short": ("is empty", "give at least {min_length}"),
    "tuple_type": ("is no list", "write one in brackets"),
    "list_type": ("is no list", "write one in brackets"),
    "dict_type": ("is no table", "set single keys of it"),
    "model_type": ("is no table", "set single keys of it"),
}
# of numbers as options give them, which are texts
_PERCENT = ("int_parsing", "float_parsing")


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and not longer than it needs to be known again."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**SHOWN:
        # Python refuses to write very long ones
        return f"a number of more than {SHOWN} digits"
    text = value if isinstance(value, str) and value.isprintable() and value.strip() else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def finding(item: "ErrorDetails") -> str:
    """What the value is not, for example ``is no number``."""
    return _said(item)[0]


def complaint(item: "ErrorDetails") -> str:
    """The value, what it is not, and what to give; without its name, which stands before it."""
    what, remedy = _said(item)
    return f"{what}; {remedy}" if item["type"] == "missing" else f"{shown(item['input'])} {what}; {remedy}"


def _said(item: "ErrorDetails") -> tuple[str, str]:
    if item["type"] == "value_error":
        what, _, remedy = str(item["ctx"]["error"]).partition("; ")
        return what, remedy
    what, remedy = KNOWN.get(item["type"], ("is not understood", "README.md has what it can be"))
    limits = {key: _plain(value) for key, value in item.get("ctx", {}).items()}
    if item["type"] in _PERCENT and (share := _share(item["input"])) is not None:
        remedy = f"write {share:g}"
    return what.format(**limits), remedy.format(**limits)


def _plain(limit: Any) -> str:
    """A limit as it is written: pydantic has floats, and choices in quotes."""
    return f"{limit:g}" if isinstance(limit, float) else str(limit).replace("'", "").replace(" or ", ", ")


def _share(value: object) -> float | None:
    """The share that a percentage means, or None for what is none."""
    try:
        return float(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else None
    except ValueError:
        return None
