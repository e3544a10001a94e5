"""Pages of what a run directory may hold and nobody planned for."""

import ast
import base64
import gzip
import json
import re
import xml.etree.ElementTree as ET

import pytest

from paramlens.analysis.circuit import circuit
from paramlens.cli.main import main
from paramlens.errors import RunDirError
from paramlens.files import plain
from paramlens.page import report
from paramlens.runs.rundir import open_run
from paramlens.runs.shipped import example
from test_page import needs_browser, opened, require_panel, require_quiet, saved


@pytest.fixture
def run(tmp_path):
    return example(tmp_path / "run")


def embedded(html: str) -> list[str]:
    """Every JSON document of a page."""
    plain = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html)
    packed = re.findall(r'<script type="text/plain"[^>]*>(.*?)</script>', html)
    return plain + [gzip.decompress(base64.b64decode(each)).decode() for each in packed]


def test_numbers_that_are_not_finite_leave_the_page_whole(run):
    """JSON has no word for them, and a browser reads none of a document that has one."""
    with (run / "metrics.jsonl").open("a") as lines:
        step, losses = 10**6, json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["losses"]
        lines.write(json.dumps({"step": step, "losses": dict.fromkeys(losses, float("nan")), "evaluation": {"recon": float("inf")}}) + "\n")
    file = run / "analysis/catalogue.json"
    document = json.loads(file.read_text())
    next(iter(document["sites"].values()))["parts"][0]["removed"] = float("inf")
    file.write_text(json.dumps(document))
    documents = embedded(report(run, budget=1e308).read_text(encoding="utf-8"))
    assert len(documents) > 2
    for each in documents:
        json.loads(each, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@needs_browser
@pytest.mark.slow
def test_any_token_can_be_shown_and_saved(run):
    """Letters of two code units at the edge of a narrow cell, control characters, and a token wider than the page."""
    file = run / "analysis/catalogue.json"
    document = json.loads(file.read_text())
    tokens = ["a😀b", "\x00", "\x1b[0m", "שלום", "", "\n", "<b>", "x" * 400]
    document["tokens"] = [[tokens[i % len(tokens)] for i in range(len(row))] for row in document["tokens"]]
    for part in (part for site in document["sites"].values() for part in site["parts"]):
        part["reads"] = [{"what": token, "value": 1.0} for token in tokens]
    file.write_text(json.dumps(document))
    with opened(report(run)) as (page, complaints, requests):
        page.select_option("#view", label="sequence 1")
        page.locator("#map-svg [role=button]").nth(3).click()
        require_panel(page, page.locator("#map-svg [role=button]").nth(3).get_attribute("aria-label"))
        svg = saved(page, page.locator("#map-tools [data-save=SVG]")).decode()
        assert "a😀" in "".join(ET.fromstring(svg).itertext())
        assert saved(page, page.locator("#map-tools [data-save=PNG]")).startswith(b"\x89PNG")
        require_quiet(page, complaints, requests)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        pytest.param("circuit", "step", marks=pytest.mark.slow),
        ("catalogue", "masked"),
        pytest.param("edges", "edges", marks=pytest.mark.slow),
    ],
)
def test_an_analysis_that_lacks_what_the_page_reads_is_made_again(run, name: str, key: str):
    file = run / f"analysis/{name}.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({each: value for each, value in document.items() if each != key}))
    report(run)
    assert key in json.loads(file.read_text())


def test_an_analysis_of_a_large_run_may_be_longer_than_other_files(run, monkeypatch: pytest.MonkeyPatch):
    """The catalogue of 72 sites and sequences of 64 tokens passes the bound that catches files which are none of ours."""
    monkeypatch.setattr(plain, "MOST_JSON", 10**5)
    monkeypatch.setattr(plain.read_json, "__kwdefaults__", {"most": 10**5})
    assert (run / "analysis/catalogue.json").stat().st_size > 10**5
    assert report(run).is_file()


def test_a_line_of_metrics_that_is_no_mapping_is_named(run):
    file = run / "metrics.jsonl"
    file.write_text("5\n" + file.read_text())
    with pytest.raises(RunDirError, match="metrics.jsonl line 1: not JSON"):
        report(run)


@pytest.mark.slow
def test_all_of_a_page_has_the_threshold_of_its_circuit(run):
    found = circuit(open_run(run), threshold=0.5, batches=1, adversary=0)
    open_run(run).save_analysis("circuit", found.to_json())
    report(run)
    assert {json.loads((run / f"analysis/{name}.json").read_text())["threshold"] for name in ("circuit", "catalogue", "edges")} == {0.5}


def test_the_printed_python_opens_a_run_of_any_name(tmp_path):
    place = example(tmp_path / "a 😀 'q' é")
    document = json.loads(embedded(report(place).read_text(encoding="utf-8"))[0])
    assert ast.literal_eval(document["opened"].removeprefix("paramlens.open_run")) == str(place)


def test_a_place_taken_by_something_else_is_told_with_a_remedy(tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert main(["report", str(tmp_path / "taken"), "--example"]) == 2
    told = capsys.readouterr().err
    assert "give another place for the shipped run" in told
    assert "--out" not in told


@needs_browser
@pytest.mark.slow
def test_a_long_name_leaves_the_circuit_in_sight(run):
    name = "blocks.0.attn." + "q" * 120
    for each in ("model", "analysis/circuit", "analysis/catalogue", "analysis/edges"):
        file = run / f"{each}.json"
        file.write_text(file.read_text().replace("blocks.0.attn.q", name))
    with opened(report(run)) as (page, complaints, requests):
        assert page.evaluate("document.getElementById('circuit-svg').viewBox.baseVal.width") < 1200
        assert name in page.locator("#circuit-svg [data-site='0']").get_attribute("aria-label")
        require_quiet(page, complaints, requests)
