"""Imports go one way: no circle among modules or rooms, and CONTRIBUTING.md draws the floors as they are."""

import graphlib
import re
from pathlib import Path

import pytest

from tests.architecture import drawing, floors, module_imports, room_imports

CONTRIBUTING = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_modules_import_in_no_circle():
    modules = module_imports()
    assert len(modules) > 100
    assert "operator.design" in modules["operator.linear"], "imports are found"
    assert "commands.in_memory" in modules["hf"], "those inside of functions, too"
    assert "commands.verify" in modules["__init__"], "and those by name"
    assert "operator.terms.lowrank" in modules["operator.terms.registry"], "kinds of terms among them"
    floors(modules)


def test_rooms_import_in_no_circle():
    ground, *_, roof = floors(room_imports(module_imports()))
    assert "errors" in ground
    assert roof == ["__init__", "__main__"]


def test_a_circle_is_found():
    with pytest.raises(graphlib.CycleError):
        floors({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_the_drawing_is_of_this_house():
    (drawn,) = re.findall(r"```text\n(.*?)\n```", CONTRIBUTING, flags=re.DOTALL)
    assert drawn == drawing(), "print it anew by python -m tests.architecture"
