"""The kinds of terms there are: a name in config.json and in recipes, and the class that it stands for.

Classes are imported when they are first asked for, so that recipes can be checked before torch is imported.
"""

import importlib
from typing import Any

from spmconvert.errors import OptionError
from spmconvert.operator.terms.term import Term

KINDS: dict[str, str] = {
    "spm": "spmconvert.operator.terms.spm:Stages",
    "monarch": "spmconvert.operator.terms.monarch:Monarch",
    "blockdense": "spmconvert.operator.terms.blockdense:BlockDense",
    "sparse24": "spmconvert.operator.terms.sparse24:Sparse24",
    "lowrank": "spmconvert.operator.terms.lowrank:LowRank",
}


def term_class(kind: str) -> type[Term]:
    """The class of a kind.

    Raises:
        OptionError: when there is no such kind.
    """
    if kind not in KINDS:
        raise OptionError(f"there is no kind of term {kind!r}; choose among {', '.join(KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    found: type[Term] = getattr(importlib.import_module(module), name)
    return found


def term_from_json(in_features: int, out_features: int, entry: Any) -> Term:
    """Read a term of any kind back.

    Raises:
        OptionError: when it describes none.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        raise OptionError(f"a term is {entry!r}; it needs a table with a kind, one of {', '.join(KINDS)}")
    return term_class(entry["kind"]).from_json(in_features, out_features, entry)


def term_from_options(in_features: int, out_features: int, entry: Any) -> Term:
    """The same from a recipe, where numbers that have a default may be left out.

    Raises:
        OptionError: when it describes none.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        raise OptionError(f"a term is {entry!r}; it needs a table with a kind, one of {', '.join(KINDS)}")
    options = {key: value for key, value in entry.items() if key != "kind"}
    return term_class(entry["kind"]).from_options(in_features, out_features, options)
