"""The code of a portable checkpoint is this package's own, complete, and short."""

import symtable

import pytest

from spmconvert.exporting.portable import PLAIN
from spmconvert.exporting.source import bundled
from spmconvert.model.portable import PortableConfig, PortableModel
from spmconvert.operator.plain import PlainStages, PlainWrapped24, plain_lowrank
from spmconvert.operator.reference import _mix
from spmconvert.operator.terms.registry import KINDS

EVERYTHING = [PortableConfig, PortableModel, *dict.fromkeys(PLAIN.values()), PlainWrapped24]


def undefined(text):
    """Global names that a module uses and neither defines nor imports."""
    module = symtable.symtable(text, "module", "exec")
    known = {*dir(__builtins__), *__builtins__, *module.get_identifiers(), "__name__"}
    tables, found = [module], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        found |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()} - known
    return found - {"__class__"}


def test_every_kind_of_term_has_a_plain_form():
    assert set(PLAIN) == set(KINDS)


def test_all_that_is_used_is_there_and_nothing_is_imported_from_here():
    text = bundled(EVERYTHING)
    assert "spmconvert" not in text.replace("``spmconvert", "")
    assert not undefined(text)
    names = {}
    exec(compile("from __future__ import annotations\n" + text, "module", "exec"), {"__name__": "__main__"}, names)
    assert {root.__name__ for root in EVERYTHING} <= set(names)


def test_a_missing_name_would_be_found():
    assert undefined("def f():\n    return absent\n") == {"absent"}


def test_only_what_is_needed_is_there():
    text = bundled([plain_lowrank])
    assert len(text.splitlines()) < 20
    assert "class" not in text
    stages = bundled([PlainStages])
    assert "def weight_shape" in stages
    assert "def flops_per_token" not in stages, "of a dataclass only what is used"
    assert "__post_init__" not in stages
    assert "# type: ignore" not in bundled(EVERYTHING)


def test_definitions_stand_as_they_are_but_for_docstrings():
    assert "return mixer * x if mixer.shape[-1] == 1 else torch.bmm(mixer, x)" in bundled([_mix])
    assert '"""Partner of every block in a stage, as tensors."""\n    own = torch' in bundled([PlainStages])


def test_two_definitions_of_a_name_are_refused():
    from spmconvert.operator import merged

    with pytest.raises(ValueError, match="_mix is defined in"):
        bundled([_mix, merged._mix])
