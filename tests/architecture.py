"""Who imports whom in the package, read from its source: what ``test_architecture`` asserts and CONTRIBUTING.md shows.

``python -m tests.architecture`` prints the floors. A room is a folder of the package, or a module that lies in none. The
floor of a room is one above the highest of those it imports from, so whatever stands on a floor imports from below it.
Imports inside of functions count; those for a type checker alone do not, since they bind nothing when the program runs.
"""

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "spmconvert"


def module_imports() -> dict[str, set[str]]:
    """Modules of the package that each module imports, by dotted name without the package."""
    files = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    return {name: {found for found in _imported(file, set(files)) if found != name} for name, file in files.items()}


def room_imports(modules: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same between rooms."""
    rooms: dict[str, set[str]] = {}
    for name, imported in modules.items():
        found = rooms.setdefault(room_of(name), set())
        found |= {room_of(other) for other in imported} - {room_of(name)}
    return rooms


def room_of(module: str) -> str:
    """The folder of the package that a module lies in, or the module where it lies in none."""
    return module.partition(".")[0]


def floors(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """From the ground up.

    Raises:
        graphlib.CycleError: where there is a circle; it names the way round.
    """
    sorter = TopologicalSorter(imports)
    height: dict[str, int] = {}
    for name in sorter.static_order():
        height[name] = max((1 + height[other] for other in imports[name]), default=0)
    return [sorted(name for name in height if height[name] == floor) for floor in range(1 + max(height.values()))]


def drawing() -> str:
    """The floors of the rooms, the highest first, one a line."""
    found = floors(room_imports(module_imports()))
    lines = [f"{floor:>2}  {'  '.join(rooms)}" for floor, rooms in enumerate(found)]
    return "\n".join(reversed(lines)).replace("__init__", "spmconvert").replace(".", "/")


def _imported(file: Path, known: set[str]) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    checking = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typing_only = {id(child) for node in checking for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "spmconvert":
            for alias in node.names:
                yield from _module(f"{node.module}.{alias.name}", known)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "spmconvert":
                    yield from _module(alias.name, known)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("spmconvert."):
            # modules that are imported by their names when they are first used
            yield from _module(node.value.partition(":")[0], known)


def _module(dotted: str, known: set[str]) -> Iterator[str]:
    name = dotted.removeprefix("spmconvert").removeprefix(".")
    while name:
        for candidate in (name, f"{name}.__init__"):
            if candidate in known:
                yield candidate
                return
        name = name.rpartition(".")[0]


if __name__ == "__main__":
    print(drawing())
