"""Imports point downward only."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "spmconvert"
# from the bottom up; a module may import from its own layer's package and from those before it
LAYERS = [
    ["version", "errors", "caches", "devices", "processes", "units", "fresh"],
    ["operator"],
    ["recipe", "checkpoint", "text"],
    ["fitting", "distill"],
    ["surgery"],
    ["plan"],
    ["sensitivity", "response", "sequential"],
    ["layerfit"],
    ["curvecache", "curves"],
    ["allocation"],
    ["fitrun"],
    ["conversion"],
    ["finetuning"],
    ["reporting"],
    ["verification", "exporting", "demonstration"],
    ["console"],
    ["cli", "__main__", "__init__"],
]
# upward imports inside functions, each with its reason beside it in the code
EXCEPTIONS = {("operator/linear.py", "fitting"), ("surgery/hf.py", "conversion")}


def layer_of(name: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if name in names)


def imports(file: Path) -> set[tuple[str, bool]]:
    """Top-level parts of this package that a file imports, and whether only for type checking."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    checking = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typing_only = {id(child) for node in checking for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("spmconvert"):
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            found |= {(name, id(node) in typing_only) for name in names}
    return found


def test_imports_point_downward():
    checked = 0
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE).as_posix()
        own = layer_of(place.split("/")[0].removesuffix(".py"))
        for name, typing_only in imports(file):
            checked += 1
            if typing_only or (place, name) in EXCEPTIONS:
                continue
            # operator/geometry is integers only and below everything
            assert layer_of(name) <= own, f"{place} imports {name}, which is above it"
    assert checked > 40
