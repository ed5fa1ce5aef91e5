"""The source of some functions and classes, with all that they use of this package, as the text of one module.

A checkpoint that carries its own code is to carry the code that is tested here, not a copy that somebody has to keep like
it. So the definitions are cut out of their files: a name that a definition uses is followed to where it is defined, in this
package to its own source, elsewhere to the import of it. Of a dataclass only the members stay that something uses; of a
docstring only the first line.

What it gives up: names are taken as they stand, so two definitions of one name cannot go into one module, and neither can a
definition that is made while its module runs, or an import inside of a function.
"""

import ast
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = "spmconvert"


def bundled(roots: Sequence[object]) -> str:
    """Definitions and what they use, in an order in which they can be executed.

    Args:
        roots: functions and classes of this package.

    Returns:
        Imports, and then the definitions; without a docstring of the module.

    Raises:
        ValueError: when two of the definitions have one name.
    """
    bundle = _Bundle()
    for root in roots:
        bundle.add(_Place(root.__module__, root.__qualname__))  # type: ignore[attr-defined]
    return bundle.text()


@dataclass(frozen=True)
class _Place:
    """Where a name is defined."""

    module: str
    name: str


@dataclass
class _Bundle:
    """What was found so far.

    Attributes:
        order: definitions, those that others use before them.
        imports: statements.
        attributes: names that stand behind a dot anywhere.
    """

    order: dict[_Place, ast.stmt] = field(default_factory=dict)
    imports: dict[str, None] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    _open: set[_Place] = field(default_factory=set)

    def add(self, place: _Place) -> None:
        """Follow a name to its definition, and what that uses."""
        if place in self.order or place in self._open:
            return
        module = _Module.of(place.module)
        if place.name in module.imports:
            source, name, statement = module.imports[place.name]
            if source is None or not source.startswith(PACKAGE):
                self.imports[statement] = None
            else:
                self.add(_Place(source, name))
            return
        definition = module.definitions.get(place.name)
        if definition is None:
            # a builtin, or a local name
            return
        clash = next((other for other in self.order if other.name == place.name), None)
        if clash is not None:
            raise ValueError(f"{place.name} is defined in {clash.module} and in {place.module}; rename one of them")
        self._open.add(place)
        self._follow(place, definition)
        self.order[place] = definition
        self._open.discard(place)

    def _follow(self, place: _Place, definition: ast.stmt) -> None:
        parts = self._parts(definition)
        self.attributes |= {node.attr for part in parts for node in ast.walk(part) if isinstance(node, ast.Attribute)}
        for part in parts:
            for node in ast.walk(part):
                if isinstance(node, ast.Name):
                    self.add(_Place(place.module, node.id))

    def _parts(self, definition: ast.stmt) -> list[ast.AST]:
        """A definition without the members of a dataclass that nothing uses."""
        if not _is_dataclass(definition):
            return [definition]
        assert isinstance(definition, ast.ClassDef)
        left_out = self._left_out(definition)
        kept = [member for member in definition.body if member not in left_out]
        return [*definition.decorator_list, *definition.bases, *kept]

    def _left_out(self, definition: ast.stmt) -> list[ast.stmt]:
        if not _is_dataclass(definition):
            return []
        assert isinstance(definition, ast.ClassDef)
        return [member for member in definition.body if getattr(member, "name", None) not in (None, *self.attributes)]

    def text(self) -> str:
        """The module."""
        self._settle()
        cut = [
            _Module.of(place.module).cut(definition, self._left_out(definition)) for place, definition in self.order.items()
        ]
        imports = [statement for statement in sorted(self.imports) if statement.startswith("import ")]
        names: dict[str, list[str]] = {}
        for statement in sorted(set(self.imports) - set(imports)):
            source, name = statement.removeprefix("from ").split(" import ")
            names.setdefault(source, []).append(name)
        imports += [f"from {source} import {', '.join(found)}" for source, found in names.items()]
        parts = dict.fromkeys(cut)
        # constants follow each other line by line, before all that may use them
        constants = [part for part in parts if not part.startswith(("def ", "class ", "@"))]
        rest = [part for part in parts if part not in constants]
        # one empty line between definitions: the file is to be short
        return "\n\n".join(filter(None, ["\n".join(imports), "\n".join(constants), *rest])) + "\n"

    def _settle(self) -> None:
        """Follow the members of dataclasses that came to be used after these were found, until there are none."""
        size = None
        while size != (size := (len(self.order), len(self.attributes))):
            for place, definition in list(self.order.items()):
                # inside of methods, so that what is added may stand behind the class
                self._follow(place, definition)


@dataclass(frozen=True)
class _Module:
    """A module of this package, as its text.

    Attributes:
        lines: of the file.
        imports: module, name and statement of every imported name; no module for ``import name``.
        definitions: functions, classes and constants by name.
    """

    lines: list[str]
    imports: dict[str, tuple[str | None, str, str]]
    definitions: dict[str, ast.stmt]

    @classmethod
    def of(cls, name: str) -> "_Module":
        """Read a module."""
        return _read(name)

    def cut(self, definition: ast.stmt, left_out: Sequence[ast.stmt]) -> str:
        """The lines of a definition, without some members and with docstrings of one line."""
        gone: set[int] = set()
        replaced: dict[int, str] = {}
        for member in left_out:
            first = min([member.lineno, *(each.lineno for each in getattr(member, "decorator_list", []))])
            # and the empty line before it
            gone.update(range(first - 1, (member.end_lineno or member.lineno) + 1))
        for node in ast.walk(definition):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            text = ast.get_docstring(node)
            if text is None:
                continue
            doc = node.body[0]
            gone.update(range(doc.lineno + 1, (doc.end_lineno or doc.lineno) + 1))
            summary = " ".join(text.split("\n\n")[0].split())
            replaced[doc.lineno] = f'{" " * doc.col_offset}"""{summary}"""'
        start = min([definition.lineno, *(each.lineno for each in getattr(definition, "decorator_list", []))])
        numbers = range(start, (definition.end_lineno or start) + 1)
        kept = [replaced.get(number, self.lines[number - 1]) for number in numbers if number not in gone]
        text = "\n".join(line.partition("  # type: ignore")[0] for line in kept)
        return text.rstrip()


def _is_dataclass(definition: ast.stmt) -> bool:
    decorators = definition.decorator_list if isinstance(definition, ast.ClassDef) else []
    return any(isinstance(node, ast.Name) and node.id == "dataclass" for each in decorators for node in ast.walk(each))


@cache
def _read(name: str) -> _Module:
    specification = importlib.util.find_spec(name)
    assert specification is not None
    assert specification.origin is not None
    text = Path(specification.origin).read_text(encoding="utf-8")
    imports: dict[str, tuple[str | None, str, str]] = {}
    definitions: dict[str, ast.stmt] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports[alias.asname or alias.name] = (None, alias.name, f"import {alias.name}")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imports[alias.name] = (node.module, alias.name, f"from {node.module} import {alias.name}")
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            definitions |= {name.id: node for name in found}
    return _Module(text.splitlines(), imports, definitions)
