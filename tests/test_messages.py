"""What is said: errors in one text for who calls the library and who types the command, results as JSON of the standard."""

import ast
import json
import math
import re
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from paramlens.cli.main import main
from paramlens.display.result import html
from paramlens.method.evaluate import evaluate
from paramlens.runs.metrics import MetricsFile
from paramlens.runs.rundir import open_run

COMMAND = {"cli", "commands"}
"""Folders that only the command reaches, and whose messages may speak of flags."""


def texts(node: ast.AST) -> list[str]:
    return [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def test_no_error_that_python_can_meet_names_a_flag():
    """Both are told of `overwrite` and `out`; a whole command in backticks, which anyone can type, may have flags."""
    found = []
    with resources.as_file(resources.files("paramlens")) as package:
        for file in sorted(Path(package).rglob("*.py")):
            if file.parent.name in COMMAND:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise | ast.Assign):
                    said = "".join(texts(node))
                    found += [
                        f"{file.name}:{node.lineno}: {said}"
                        for said in re.findall(r"(?<![\w`-])--[a-z][\w.-]*", re.sub(r"`[^`]*`", "", said))
                    ]
    assert found == []


def strictly(text: str) -> Any:
    """JSON by the standard, which has no word for what is not finite."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_json_has_no_word_for_what_is_not_finite(tiny_run, tmp_path, monkeypatch, capsys):
    """It is null on stdout and in every file, NaN again where it is read as a number, and fails the page's verdicts."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run.path, run)
    line = (run / "metrics.jsonl").read_text().splitlines()[0]
    broken = strictly(line) | {"losses": {"recon": math.inf, "minimality": math.nan}}
    metrics = MetricsFile(run / "metrics.jsonl", content=(run / "metrics.jsonl").read_bytes())
    metrics.append(broken)
    assert [strictly(each) for each in (run / "metrics.jsonl").read_text().splitlines()][-1]["losses"] == {
        "recon": None,
        "minimality": None,
    }
    opened = open_run(run)
    assert math.isnan(opened.metrics[-1]["losses"]["recon"])
    assert "nan" in html(opened.tables(), opened.charts())

    monkeypatch.setattr("paramlens.analysis.circuit.evaluate", not_finite)
    assert main(["circuit", str(run), "--batches", "1", "--adversary", "0", "--json"]) == 0
    document = strictly(capsys.readouterr().out)
    assert document["metrics"]["recon"] is None
    assert strictly((run / "analysis/circuit.json").read_text()) == document
    assert main(["circuit", str(run), "--batches", "1", "--adversary", "0"]) == 0
    assert main(["report", str(run)]) == 0
    assert "nan nats" in (run / "report.html").read_text(encoding="utf-8")


def not_finite(*args: Any, **how: Any) -> dict[str, float]:
    return dict.fromkeys(evaluate(*args, **how), math.nan)
