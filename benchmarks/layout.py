"""The package's layout in figures, for docs/layout.md: folders, their sizes and imports, and the files where a name is used.

python benchmarks/layout.py                  # of the working tree
python benchmarks/layout.py ab6883f          # of a commit
python benchmarks/layout.py HEAD threshold   # and the files where the word `threshold` is code
"""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "src/paramlens/"


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8").stdout


def sources(commit: str | None) -> dict[str, str]:
    """File, relative to the package → its text."""
    if commit is None:
        return {str(file.relative_to(ROOT / PACKAGE)): file.read_text(encoding="utf-8") for file in (ROOT / PACKAGE).rglob("*.py")}
    names = [name for name in git("ls-tree", "-r", "--name-only", commit, PACKAGE).splitlines() if name.endswith(".py")]
    return {name.removeprefix(PACKAGE): git("show", f"{commit}:{name}") for name in names}


def folder(file: str) -> str:
    return file.partition("/")[0] if "/" in file else file.removesuffix(".py")


def code_lines(tree: ast.AST) -> int:
    """Lines with code: no blank lines, comments or docstrings."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and id(node.value) in prose:
            continue
        if isinstance(node, ast.expr | ast.stmt | ast.arg | ast.alias | ast.ExceptHandler) and id(node) not in prose:
            lines |= {node.lineno, node.end_lineno or node.lineno}
    return len(lines)


def functions(trees: dict[str, ast.AST]) -> Iterator[tuple[int, str]]:
    """Each function's number of lines without its docstring, and its place."""
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                told = len((ast.get_docstring(node) or "").splitlines())
                yield (node.end_lineno or node.lineno) - node.lineno + 1 - told, f"{file}: {node.name}"


def imports(trees: dict[str, ast.AST]) -> dict[str, Counter[str]]:
    """Folder → the folders that its files import, with the number of import statements."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for file, tree in trees.items():
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in modules:
                if module.startswith("paramlens."):
                    found[folder(file)][module.split(".")[1]] += 1
    return found


def uses(trees: dict[str, ast.AST], word: str) -> Counter[str]:
    """File → how often `word` is a name, parameter, attribute or keyword in it."""

    def named(node: ast.AST) -> bool:
        return word in (getattr(node, field, None) for field in ("id", "arg", "attr"))

    return Counter({file: count for file, tree in trees.items() if (count := sum(map(named, ast.walk(tree))))})


def main(commit: str | None = None, word: str | None = None) -> None:
    texts = sources(commit)
    trees: dict[str, ast.AST] = {file: ast.parse(text) for file, text in texts.items()}
    arrows = imports(trees)
    sizes, files = Counter[str](), Counter[str]()
    for file, text in texts.items():
        sizes[folder(file)] += len(text.splitlines())
        files[folder(file)] += 1
    print("| folder | files | lines | imports from |\n|---|---:|---:|---|")
    for name, size in sizes.most_common():
        print(f"| `{name}` | {files[name]} | {size} | {', '.join(sorted(arrows[name].keys() - {name}))} |")
    longest = max(texts, key=lambda file: len(texts[file].splitlines()))
    print(f"\n{len(texts)} files, {sum(sizes.values())} lines, {sum(map(code_lines, trees.values()))} of them code")
    print(f"longest file: {longest}, {len(texts[longest].splitlines())} lines; longest function: {max(functions(trees))}")
    if word:
        found = uses(trees, word)
        print(f"\n`{word}` is code in {len(found)} files, {found.total()} times: {', '.join(f'{file} {n}' for file, n in found.items())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
