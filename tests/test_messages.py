"""What errors say: one text for who calls the library and who types the command."""

import ast
import re
from importlib import resources
from pathlib import Path

COMMAND = {"cli", "analysis_commands", "arguments", "options", "completion"}
"""Modules that only the command reaches, and that may speak of flags."""


def texts(node: ast.AST) -> list[str]:
    return [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def test_no_error_that_python_can_meet_names_a_flag():
    """Both are told of `overwrite` and `out`; a whole command in backticks, which anyone can type, may have flags."""
    found = []
    with resources.as_file(resources.files("paramlens")) as package:
        for file in sorted(Path(package).rglob("*.py")):
            if file.stem in COMMAND:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise | ast.Assign):
                    said = "".join(texts(node))
                    found += [
                        f"{file.name}:{node.lineno}: {said}"
                        for said in re.findall(r"(?<![\w`-])--[a-z][\w.-]*", re.sub(r"`[^`]*`", "", said))
                    ]
    assert found == []
