"""Recipes from TOML files, options and keywords; what is wrong with one is said in one line, before torch is imported."""

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from spmconvert.errors import RecipeError, first_line
from spmconvert.recipe.recipe import (
    AUTO_TEXT,
    DATASET_PREFIX,
    Budget,
    Calibration,
    Fit,
    LayerDesign,
    Override,
    Recipe,
    Training,
)
from spmconvert.system.validation import complaint, shown


def load_recipe(path: Path | None, changes: dict[str, Any], *, text: str | None = None) -> Recipe:
    """Read a recipe file and replace single values in it.

    Args:
        path: TOML file, or None to start from the defaults. A relative calibration file is relative to the recipe.
        changes: dotted key -> value, as from ``--set`` and the options; later entries win.
        text: calibration text where neither names one.

    Raises:
        RecipeError: when the file does not parse, a key is unknown or a value is outside its range.
    """
    table: dict[str, Any] = {} if path is None else _read_toml(path)
    for key, value in changes.items():
        _assign(table, key, value)
    if text is not None and isinstance(table.setdefault("calibration", {}), dict):
        table["calibration"].setdefault("file", text)
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError(_first_line(error, path, changes)) from None


def recorded_recipe(table: object) -> Recipe:
    """The recipe that a converted checkpoint says it was made by.

    Raises:
        RecipeError: when it is none that this version understands.
    """
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError(f"the recorded recipe is not understood ({_first_line(error, None)}); convert again") from None


_SHORT_KEYS = {
    "stages": "design.stages",
    "variant": "design.variant",
    "block": "design.block",
    "rank": "design.rank",
    "calib": "calibration.file",
    "keep": "budget.keep",
    "keep_bytes": "budget.keep_bytes",
    "keep_flops": "budget.keep_flops",
    "max_error": "budget.max_error",
    "speedup": "budget.speedup",
    "tokens": "budget.tokens",
    "rows": "budget.rows",
    "allow_slower": "budget.allow_slower",
    "sensitivity": "budget.sensitivity",
    "structures": "budget.structures",
    "sequential": "fit.sequential",
    "new_bias": "fit.new_bias",
    "output_weighting": "fit.output_weighting",
    "refine": "fit.refine",
}
# what the options are called whose values end up under these keys
_OPTIONS = {
    **{key: f"--{short.replace('_', '-')}" for short, key in _SHORT_KEYS.items() if short != "output_weighting"},
    **{key: f"--{key}" for key in ("targets", "ignore", "layers", "seed", "dtype")},
    **{f"finetune.{key}": f"--{key.replace('_', '-')}" for key in ("steps", "minutes", "batch_size", "block_size")},
    "finetune.train": "--train",
    "finetune.seed": "--seed",
    "finetune.learning_rate": "--lr",
}
_FINETUNE = "finetune."


def recipe_from_keywords(keywords: dict[str, Any], path: Path | None = None, *, text: str | None = None) -> Recipe:
    """A recipe from Python keyword arguments over an optional recipe file.

    Keys are those of the recipe, dotted where they are in a table; the design and the calibration file may be given by
    their short names (``stages``, ``variant``, ``block``, ``rank``, ``calib``), and lists of patterns as one string.

    Raises:
        RecipeError: when a key is unknown or a value outside its range.
    """
    changes = {_SHORT_KEYS.get(key, key): value for key, value in keywords.items()}
    for key in ("targets", "ignore", "budget.structures"):
        if isinstance(changes.get(key), str):
            changes[key] = [pattern.strip() for pattern in changes[key].split(",") if pattern.strip()]
    return load_recipe(path, changes, text=text)


def training_from_keywords(keywords: dict[str, Any], path: Path | None = None) -> Training:
    """The table ``finetune`` of an optional recipe file, with single keys of it replaced.

    Raises:
        RecipeError: when a key is unknown or a value outside its range.
    """
    for key in keywords:
        if key.startswith(_FINETUNE):
            alone = key.removeprefix(_FINETUNE)
            raise RecipeError(f"--set {key} names the only table there is; leave the prefix out: --set {alone}=VALUE")
    return load_recipe(path, {f"{_FINETUNE}{key}": value for key, value in keywords.items()}).finetune


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split ``a.b=c`` into the dotted key and a TOML value; a bare word counts as a string.

    Raises:
        RecipeError: when there is no equals sign or no key.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set {text!r} has no key=value form; write for example --set fit.iterations=300")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
    except (ValueError, RecursionError):
        raise RecipeError(
            f"--set {key.strip()} has a value that is no number, text or list that can be read ({len(value)} characters); "
            "write for example --set fit.iterations=300"
        ) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist; give the path of a TOML file") from None
    except RecursionError:
        raise RecipeError(f"recipe {path} cannot be read: it is nested too deeply; fix the file") from None
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}; give the path of a TOML file") from None
    except ValueError as error:
        # TOML, text and numbers that are none
        raise RecipeError(f"recipe {path} cannot be read: {first_line(error)}; fix the file") from None
    calibration = table.get("calibration")
    if isinstance(calibration, dict) and isinstance(text := calibration.get("file"), str):
        is_file = text != AUTO_TEXT and not text.startswith(DATASET_PREFIX)
        calibration["file"] = str(path.parent / text) if is_file else text
    return table


def _assign(table: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise RecipeError(f"key {key!r} goes through {parent!r}, which is a value and not a table")
    table[last] = value


def _first_line(error: ValidationError, path: Path | None, given: Collection[str] = ()) -> str:
    """What is wrong with a recipe, in one line.

    Args:
        error: pydantic's.
        path: file of the recipe, or None.
        given: dotted keys that options replaced in it.
    """
    items = error.errors()
    # a list whose items are all wrong is called too short besides
    containers = {item["loc"][:-1] for item in items} - {()}
    problems = [_problem(item, path, given) for item in items if item["loc"] not in containers]
    return " | ".join(problems)


def _problem(item: ErrorDetails, path: Path | None, given: Collection[str]) -> str:
    key = ".".join(map(str, item["loc"]))
    in_file = path is not None and not any(key == name or key.startswith(f"{name}.") for name in given)
    where = f"recipe {path}: " if in_file else ""
    name = key if in_file else _OPTIONS.get(key, key)
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"{where}unknown key {key!r}; known keys are {', '.join(_known_keys(item['loc'][:-1]))}"
    if kind == "value_error" and isinstance(value, dict | BaseModel):
        # of several keys together, which the message names
        return where + ": ".join(part for part in (key, str(item["ctx"]["error"])) if part)
    if kind in ("model_type", "dict_type", "tuple_type", "list_type"):
        return f"{where}{name} is {_form(item['loc'])}, found {shown(value)}; {_form_remedy(key, item)}"
    return f"{where}{name} {complaint(item)}"


def _form(location: tuple[int | str, ...]) -> str:
    """What a key that holds several values is."""
    last = location[-1]
    return f"a list of {_LISTS[last]}" if last in _LISTS else "a table"


def _form_remedy(key: str, item: ErrorDetails) -> str:
    if _form(item["loc"]) != "a table":
        return 'write it in brackets, such as ["mlp"]' if key in ("targets", "ignore") else "write it in brackets"
    names = _known_keys(item["loc"]) if len(item["loc"]) == 1 else []
    return f"set a key of it: {key}.{names[0]}=VALUE" if names else "write keys and values in braces"


# what the lists of a recipe are of
_LISTS: dict[int | str, str] = {
    "targets": "patterns",
    "ignore": "patterns",
    "terms": "tables",
    "overrides": "tables",
    "structures": "kinds of terms",
}


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    tables: dict[str, type[BaseModel]] = {
        "design": LayerDesign,
        "overrides": Override,
        "calibration": Calibration,
        "fit": Fit,
        "budget": Budget,
        "finetune": Training,
    }
    if location:
        model = tables.get(str(location[0]), Recipe)
    return list(model.model_fields)
