"""Every option and every recipe key as docs/options.md has them, read from the code.

``python -m tests.options > docs/options.md`` writes the page anew; a test compares. What an option means is its help text,
what a key means is the line of its table's docstring, so neither stands twice.
"""

import json
import re
from collections.abc import Iterator
from inspect import cleandoc
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

from spmconvert.cli.app import app
from spmconvert.recipe.recipe import Recipe

HEAD = """# Options and recipe keys

Written by `python -m tests.options > docs/options.md` from the code; `spmconvert COMMAND --help` says the same.
"""
RECIPE_HEAD = """## Recipe

A recipe is a TOML file for `--recipe`; options and `--set table.key=value` replace single values of it, and a key that does
not exist is an error. `finetune` takes the keys of its table without the prefix: `--set clip=0.5`. Complete ones lie in
[recipes/](../recipes), with what was measured: [recipes.md](recipes.md).
"""
KINDS = {
    "tuple[dict": "tables",
    "tuple": "list",
    "Path": "path",
    "bool": "true, false",
    "int": "whole number",
    "float": "number",
}
# that of a seed says nothing to a reader
HUGE = Lt(2**63)
BOUNDS = {Ge: "at least {0.ge}", Gt: "above {0.gt}", Le: "at most {0.le}", Lt: "below {0.lt}"}


def page() -> str:
    """The whole page."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    commands = [line for name, command in group.commands.items() for line in _command(name, command)]
    return "\n".join([HEAD, *commands, RECIPE_HEAD, *_table("", Recipe)]).rstrip() + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [param for param in command.params if not isinstance(param, TyperOption)]
    usage = " ".join([f"spmconvert {name}", *(_argument(param) for param in arguments)])
    yield from (f"## `{usage}`", "", command.help, "")
    yield from (f"`{_argument(param)}`: {param.help}\n" for param in arguments)
    options = [param for param in command.params if isinstance(param, TyperOption)]
    for panel in dict.fromkeys(option.rich_help_panel for option in options):
        yield from (f"| {panel} | |", "|---|---|")
        for option in options:
            if option.rich_help_panel == panel:
                names = ", ".join(f"`{given}`" for given in (*option.opts, *option.secondary_opts))
                yield f"| {names} | {_cell(option.help or '')}{_default(option)} |"
        yield ""


def _argument(param: Any) -> str:
    shown = str(param.name).upper() + ("..." if param.nargs != 1 else "")
    return shown if param.required else f"[{shown}]"


def _default(option: TyperOption) -> str:
    shown = option.default not in (None, False, PydanticUndefined) and not option.secondary_opts
    return f" Default `{option.default}`." if shown else ""


def _table(name: str, model: type[BaseModel]) -> Iterator[str]:
    tables = {}
    yield from ("| key | values | default | meaning |", "|---|---|---|---|")
    meanings = attributes(model)
    for key, field in model.model_fields.items():
        inner = next((kind for kind in _parts(field.annotation) if _is_table(kind)), None)
        shown = f"[[{key}]]" if key == "overrides" else f"[{key}]" if inner else name + key
        if inner is not None:
            tables[key] = inner
        values = "a table" if inner else _values(field.annotation, field.metadata)
        default = "" if inner else _shown(field.default)
        yield f"| `{shown}` | {values} | {default} | {_cell(meanings[key])} |"
    yield ""
    for key, inner in tables.items():
        first, *others = cleandoc(inner.__doc__ or "").partition("\n\nAttributes:")[0].split("\n\n")
        yield from (f"### `{'[[overrides]]' if key == 'overrides' else f'[{key}]'}`", "", " ".join([first, *others]), "")
        yield from _table(f"{key}.", inner)


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _parts(part)


def _values(annotation: Any, metadata: list[Any]) -> str:
    """What a key may be, in words."""
    text = str(annotation)
    literal = re.search(r"Literal\[([^\]]*)\]", text)
    if literal:
        return ", ".join(f"`{value.strip()}`".replace("'", '"') for value in literal.group(1).split(","))
    marks = [*metadata, *(mark for part in _parts(annotation) for mark in _bounds(part))]
    bounds = [BOUNDS[type(mark)].format(mark) for mark in marks if type(mark) in BOUNDS and mark != HUGE]
    names = (
        ("tuple[dict", "tables"),
        ("tuple", "list"),
        ("Path", "path"),
        ("bool", "true, false"),
        ("int", "whole number"),
    )
    kind = next((shown for found, shown in (*names, ("float", "number")) if found in text), "text")
    return ", ".join([kind, *dict.fromkeys(bounds)]) if kind not in ("list", "tables") else kind


def _bounds(part: Any) -> list[Any]:
    return [mark for field in getattr(part, "__metadata__", ()) for mark in getattr(field, "metadata", [field])]


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if default is PydanticUndefined:
        return "must be given"
    if isinstance(default, bool):
        return f"`{default}`".lower()
    return f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`"


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def attributes(model: type[BaseModel]) -> dict[str, str]:
    """What the docstring of a model says of its fields."""
    listed = cleandoc(model.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.split(r"^    (\w+): ", listed, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}


if __name__ == "__main__":
    print(page(), end="")
