"""The run that comes with the library."""

import json
import subprocess
import sys

import pytest

import paramlens
from paramlens.analysis.circuit import circuit
from paramlens.errors import RunDirError
from paramlens.runs.verification import verify
from rounding import near_divergence


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return paramlens.example(tmp_path_factory.mktemp("shipped") / "runs" / "example")


@pytest.mark.slow
def test_the_example_is_whole_and_says_what_it_said(shipped):
    assert verify(shipped).whole
    run = paramlens.open_run(shipped)
    assert run.status == "finished"
    kept = json.loads((shipped / "analysis/circuit.json").read_text())
    now = circuit(run, adversary=0)
    assert now.metrics["recon"] == near_divergence(kept["metrics"]["recon"], run.task.model(run.task.batch(0, "circuit").inputs))
    for name, site in now.sites.items():
        assert site.unique == kept["sites"][name]["unique"]
        assert site.active == pytest.approx(kept["sites"][name]["active"], abs=0.01)
    assert kept["sites"]["blocks.0.attn.v"]["active"]["s1"] == pytest.approx(1, abs=0.05)


def test_an_example_is_not_copied_over_anything(shipped, tmp_path):
    (shipped / "note.txt").write_text("mine")
    assert paramlens.example(shipped) == shipped
    assert (shipped / "note.txt").read_text() == "mine"
    (tmp_path / "thing").write_text("mine")
    with pytest.raises(RunDirError, match=str(tmp_path)):
        paramlens.example(tmp_path)


def test_its_page_needs_no_torch(tmp_path):
    code = """if True:
        import sys
        from paramlens.cli.main import main
        assert main(["report", "--example", "--json"]) == 0
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"page": "runs/example/report.html"}
    assert (tmp_path / "runs/example/report.html").stat().st_size < 8e6


def test_report_wants_a_run_or_the_example(capsys):
    from paramlens.cli.main import main

    assert main(["report"]) == 2
    assert "give a run directory first, then options; or --example" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_open_asks_for_a_browser(shipped, monkeypatch, capsys, there: bool):
    from paramlens.cli.main import main

    asked: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: asked.append(address) or there)
    assert main(["report", str(shipped), "--open"]) == 0
    assert asked == [(shipped / "report.html").absolute().as_uri()]
    assert ("no browser was found" in capsys.readouterr().err) is not there
