"""A new analysis is one file and one line: its command, its JSON, its table and its section of the page come with it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import paramlens
from paramlens.analysis.circuit import circuit
from paramlens.runs.rundir import open_run

TOY = '''"""The norm of every decomposed weight."""

import plotly.graph_objects as go

from paramlens.analysis.analysis import Analysis, Section
from paramlens.display.figures import Figure, styled
from paramlens.display.outcome import Outcome
from paramlens.display.tables import Table, columns, row


class NormsAnalysis(Analysis):
    name = "norms"
    section = Section("norms", "Norms of the weights", "<p>Of order {{ document.power }}, at {{ document.norms | length }} sites.</p>")

    def compute(self, run, *, power: float = 2.0) -> Outcome:
        """Measure the norm of every decomposed weight.

        Args:
            run: Run directory.
            power: Order of the norm, above 0.
        """
        norms = {site.name: site.W.norm(power).item() for site in run.decomposition.sites}
        rows = tuple(row(name, f"{norm:.3f}") for name, norm in norms.items())
        return Outcome({"power": power, "norms": norms}, [Table("Norms of the weights", columns("site", "norm"), rows)])

    def figures(self, document):
        plot = go.Figure().add_bar(x=list(document["norms"]), y=list(document["norms"].values()), name="norm", meta=0)
        yield Figure("norms", "Norm of every decomposed weight.", styled(plot, height=300))
'''


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the toy's file and its line of the registry."""
    folder = tmp_path_factory.mktemp("extended")
    package = folder / "paramlens"
    shutil.copytree(Path(paramlens.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "analysis" / "commands" / "norms.py").write_text(TOY, encoding="utf-8")
    registry = package / "registry.py"
    text = registry.read_text(encoding="utf-8")
    line = "ANALYSES: tuple[Analysis, ...] = (\n"
    assert line in text
    registry.write_text(
        text.replace(line, f"from paramlens.analysis.commands.norms import NormsAnalysis\n\n{line}    NormsAnalysis(),\n"), encoding="utf-8"
    )
    return folder


def test_an_analysis_is_one_file_and_one_line(extended: Path, tiny_run, tmp_path):
    def command(*words: str) -> str:
        path = os.pathsep.join([str(extended), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "NUMBA_DISABLE_JIT": "1"}
        line = [sys.executable, "-m", "paramlens", *words]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shutil.copytree(tiny_run.path, tmp_path / "run")
    explained = " ".join(command("norms", "--help").split())
    assert "Measure the norm of every decomposed weight." in explained
    assert "--power FLOAT Order of the norm, above 0. [default: 2.0]" in explained
    assert "--power" in command("completion", "bash")
    document = json.loads(command("norms", "run", "--power", "1", "--json"))
    assert document["norms"].keys() == tiny_run.decomposition.U.keys()
    assert json.loads((tmp_path / "run/analysis/norms.json").read_text()) == {"step": tiny_run.step, **document}
    run = open_run(tmp_path / "run")
    run.save_analysis("circuit", circuit(run, batches=1, adversary=1).to_json())
    command("report", "run")
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert '<section id="norms" aria-labelledby="norms-heading">' in page
    assert "<p>Of order 1.0, at 6 sites.</p>" in page
    assert 'id="plot-norms"' in page
