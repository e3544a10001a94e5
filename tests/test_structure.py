"""The package's own order: folders import downwards, no two modules import each other, and files and functions stay short."""

import ast
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
LONGEST_FILE, LONGEST_FUNCTION, COMMAND_LINE = 400, 60, 500
"""In lines, a function's docstring not counted; the last, all of `cli`."""


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in sorted(SOURCE.rglob("*.py"))}


def imported(nodes: Iterable[ast.AST], modules: Mapping[str, object]) -> Iterator[str]:
    """Modules of the package that are imported by `nodes`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "paramlens")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            assert node.module is not None
            if node.module.split(".")[0] == "paramlens":
                whole = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name if name in modules else node.module for name in whole)


def layers() -> list[str]:
    """Folders and modules below the package, the uppermost first, as import-linter checks them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    return next(contract["layers"] for contract in contracts if contract["type"] == "layers")


def layer(module: str) -> str:
    return ".".join(module.split(".")[:2])


INNER = {name: tree for name, tree in TREES.items() if name not in ("paramlens", "paramlens.__main__")}
IMPORTS = {name: set(imported(ast.walk(tree), TREES)) - {name} for name, tree in INNER.items()}
"""Module → those that it imports anywhere, in functions and for type checkers too."""
AT_ONCE = {name: set(imported(tree.body, TREES)) - {name} for name, tree in INNER.items()}
"""Module → those that are imported with it."""


def test_every_folder_has_its_place_in_the_order():
    assert {layer(name) for name in INNER} == set(layers())


@pytest.mark.parametrize("module", INNER)
def test_imports_point_downwards(module):
    """Wherever they stand. The package itself, its public names, is above all its folders but for the command line, which calls them."""
    order = layers()
    assert "paramlens" not in IMPORTS[module] or layer(module) == "paramlens.cli"
    upward = [name for name in IMPORTS[module] - {"paramlens"} if order.index(layer(name)) < order.index(layer(module))]
    assert not upward


def test_no_modules_import_each_other():
    """Neither at the top of a file nor inside functions, but for the two halves of a task: the one without torch loads the other."""
    left = {name: AT_ONCE[name] if name.endswith(".task") else set(names) for name, names in IMPORTS.items()}
    while free := [name for name, names in left.items() if not names & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "in a cycle, or above one"


@pytest.mark.parametrize("module", TREES)
def test_files_and_functions_are_short(module):
    tree = TREES[module]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines()) for node in functions
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}
    last = max((getattr(node, "end_lineno", None) or 0 for node in ast.walk(tree)), default=0)
    assert last <= LONGEST_FILE


def test_the_command_line_is_short():
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in (SOURCE / "paramlens/cli").rglob("*.py")) <= COMMAND_LINE
