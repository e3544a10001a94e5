import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from paramlens.analysis.circuit import circuit
from paramlens.analysis.svd import svd_baseline
from paramlens.errors import RunDirError
from paramlens.page import report

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


needs_browser = pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed, so no browser looks at the page")


@pytest.fixture
def run(tiny_run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(tiny_run.path, path)
    (path / "analysis").mkdir(exist_ok=True)
    (path / "analysis/circuit.json").write_text(json.dumps(circuit(tiny_run, batches=1).to_json()))
    (path / "analysis/svd.json").write_text(json.dumps(svd_baseline(tiny_run, batches=1).to_json()))
    return path


def test_page_computes_the_circuit_where_it_is_missing_or_old(run, tmp_path):
    file = run / "analysis/circuit.json"
    fresh = file.read_text()
    report(run)
    assert file.read_text() == fresh
    file.write_text(fresh.replace('"step": 12', '"step": 8'))
    report(run)
    assert json.loads(file.read_text())["step"] == 12
    file.write_text(json.dumps({key: value for key, value in json.loads(fresh).items() if key != "maps"}))
    report(run)
    assert "maps" in json.loads(file.read_text())
    shutil.rmtree(run / "analysis")
    report(str(run))
    assert file.is_file()
    with pytest.raises(RunDirError, match="not a run directory"):
        report(tmp_path)


def test_page_holds_the_tables(run):
    html = report(run).read_text(encoding="utf-8")
    numbers = json.loads((run / "analysis/circuit.json").read_text())
    for name, site in numbers["sites"].items():
        assert f"<tr><td>{name}</td>" in html
        assert f"{site['active']['m']:.3f}" in html
    assert f"{numbers['metrics']['recon']:.2e}" in html
    assert "had not converged when its training ended" in html
    for change in numbers["interventions"]:
        assert f"<tr><td>{change['name']}</td><td>{change['kl']:.2e}</td>" in html
    assert len(html) < 8e6


def test_silent_sites_are_explained(run):
    file = run / "analysis/circuit.json"
    numbers = json.loads(file.read_text())
    numbers["sites"]["blocks.0.attn.k"]["silent"] = "writes zero, so every attention score is the same"
    file.write_text(json.dumps(numbers))
    assert "<b>blocks.0.attn.k</b> is silent: it writes zero, so every attention score is the same" in report(run).read_text()


def test_text_from_files_stays_text(run):
    file = run / "analysis/circuit.json"
    hostile = "</script><script>document.title='owned'</script>"
    file.write_text(file.read_text().replace("blocks.1.attn.v", hostile))
    html = report(run).read_text(encoding="utf-8")
    assert "<script>document.title" not in html
    assert "</script><script>document" not in html


def test_page_loads_nothing_from_elsewhere(run):
    html = report(run).read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", html)
    assert "default-src &#39;none&#39;" in html


@contextmanager
def opened(page_file: Path, *, width: int = 1000) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page in a browser, what its console complains of, and every address it asks for."""
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_selector("body[data-ready=true]")
        yield page, complaints, requests
        browser.close()


@needs_browser
@pytest.mark.parametrize("width", [1000, 400])
def test_page_in_a_browser(run, width: int):
    """Every figure is drawn, the console stays silent, and no request leaves."""
    with opened(report(run), width=width) as (page, complaints, requests):
        drawn = page.eval_on_selector_all(".plot", "plots => plots.map(plot => plot.querySelectorAll('.main-svg').length > 0)")
        fits = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert drawn == [True] * 9
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert fits, "the page itself does not scroll sideways"


@needs_browser
def test_a_token_that_is_a_tag_shows_as_text(run):
    """In tables and in figures, where Plotly would make markup of it; a script that got in all the same would not run."""
    token = "<script>document.title='owned'</script>"
    link = "<a href='https://example.org'>x</a>&lt;"
    file = run / "analysis/circuit.json"
    file.write_text(file.read_text().replace('"m"', json.dumps(token)).replace("blocks.1.attn.v", link))
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"target": info["target"] | {"id": token}}))
    with opened(report(run)) as (page, complaints, requests):
        shown = page.inner_text("body")
        drawn = page.eval_on_selector_all("#plot-roles text, #plot-example text", "texts => texts.map(text => text.textContent)")
        links = page.eval_on_selector_all("a", "links => links.length")
        title = page.title()
        page.evaluate("() => { const s = document.createElement('script'); s.textContent = 'document.title=1'; document.body.append(s) }")
        assert page.title() == title
    assert title == "tiny: ParamLens"
    assert token in shown
    assert any(token in text for text in drawn)
    assert any(link in text for text in drawn)
    assert links == 0
    assert len(complaints) == 1
    assert "Content Security Policy" in complaints[0]
    assert len(requests) == 1


def test_an_svd_of_an_older_checkpoint_is_left_out(run):
    assert "plot-svd" in report(run).read_text(encoding="utf-8")
    file = run / "analysis/svd.json"
    file.write_text(file.read_text().replace('"step": 12', '"step": 8'))
    assert "plot-svd" not in report(run).read_text(encoding="utf-8")
