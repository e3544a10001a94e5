import csv
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY, TINY_FACTS, tiny_with
from paramlens.analysis.agreement import agreement
from paramlens.analysis.circuit import circuit
from paramlens.analysis.edit import suppress
from paramlens.analysis.effect import evaluate_edit
from paramlens.analysis.trace import trace
from paramlens.baselines.svd import svd_baseline
from paramlens.config.file import make_config
from paramlens.display.verdicts import verdicts
from paramlens.errors import ConfigError, RunDirError
from paramlens.page import report
from paramlens.page.training import losses_figure
from paramlens.runs.decompose import decompose, decompose_config
from paramlens.runs.rundir import open_run

CHROMIUM = Path("/usr/bin/chromium")
LIMIT = 3_600_000.0
"""Milliseconds after which the browser hangs."""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


needs_browser = pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed, so no browser looks at the page")


@pytest.fixture(scope="module")
def complete(tiny_run, tmp_path_factory):
    """A copy of the tiny run with all that its page can show; read only."""
    path = tmp_path_factory.mktemp("pages") / "induction"
    shutil.copytree(tiny_run.path, path)
    run = open_run(path)
    run.save_analysis("circuit", circuit(run, batches=1).to_json())
    run.save_analysis("svd", svd_baseline(run, batches=1).to_json())
    run.save_analysis("agreement", {"step": run.step, **agreement([run, run], batches=1).to_json()})
    report(path)
    return path


@pytest.fixture
def run(complete, tmp_path):
    shutil.copytree(complete, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def facts(facts_run, tmp_path_factory):
    """A copy of the tiny facts run with an edit and a trace; read only."""
    path = tmp_path_factory.mktemp("pages") / "facts"
    shutil.copytree(facts_run.path, path)
    run = open_run(path)
    prompt, subject = "Tiger Woods plays the sport of", "Tiger Woods"
    edit = suppress(run, subcomponents=[("transformer.h.0.mlp.c_fc", 1), ("transformer.h.1.mlp.c_proj", 2)])
    run.keep_analysis("suppress", "edits", evaluate_edit(run, edit, prompt).to_json(), same=("target",))
    assert run.task is not None
    run.keep_analysis("trace", "traces", trace(run.task.model, run.task.tokenizer, prompt, subject, samples=2).to_json(), same=("prompt",))
    report(path)
    return path


def test_page_makes_the_analyses_that_are_missing_or_old(run, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("paramlens.analysis.circuit.circuit", partial(circuit, batches=1))
    files = {name: run / f"analysis/{name}.json" for name in ("circuit", "catalogue", "edges")}
    before = {name: file.stat().st_mtime_ns for name, file in files.items()}
    report(run)
    assert {name: file.stat().st_mtime_ns for name, file in files.items()} == before
    older = {key: value for key, value in json.loads(files["circuit"].read_text()).items() if key != "off_data"}
    files["circuit"].write_text(json.dumps(older))
    files["catalogue"].write_text(files["catalogue"].read_text().replace('"step": 12', '"step": 8'))
    files["edges"].unlink()
    report(str(run))
    assert [json.loads(file.read_text())["step"] for file in files.values()] == [12, 12, 12]
    assert "off_data" in json.loads(files["circuit"].read_text())
    files["edges"].write_text(files["edges"].read_text().replace("blocks.1.attn.v", "blocks.7.attn.v"))  # of another run
    files["circuit"].write_text(files["circuit"].read_text().replace('"threshold": 0.1', '"threshold": 0.5'))
    report(str(run))
    assert [json.loads(file.read_text())["threshold"] for file in files.values()] == [0.5, 0.5, 0.5]
    assert "blocks.7" not in files["edges"].read_text()
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
    for rung in numbers["adversary"]:
        cells = [str(rung["steps"]), f"{rung['one_start']:.3f}", f"{rung['worst']:.3f}", f"{rung['share']:.2f}"]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in html
    assert f"Most of it is at {max(numbers['attacked'], key=numbers['attacked'].get)}:" in html
    assert len(html.encode()) < 8e6


def test_silent_sites_are_explained(run):
    file = run / "analysis/circuit.json"
    numbers = json.loads(file.read_text())
    numbers["sites"]["blocks.0.attn.k"]["silent"] = "writes zero, so every attention score is the same"
    file.write_text(json.dumps(numbers))
    assert "<b>blocks.0.attn.k</b> is silent: it writes zero, so every attention score is the same" in report(run).read_text()


def test_text_from_files_stays_text(run):
    hostile = "</script><script>document.title='owned'</script>"
    for name in ("model", "analysis/circuit", "analysis/catalogue", "analysis/edges"):
        file = run / f"{name}.json"
        file.write_text(file.read_text().replace("blocks.1.attn.v", hostile))
    html = report(run).read_text(encoding="utf-8")
    assert "<script>document.title" not in html
    assert "</script><script>document" not in html


def test_page_loads_nothing_from_elsewhere(run):
    html = report(run).read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", html)
    assert "default-src &#39;none&#39;" in html
    assert {address.partition("/")[0] for address in re.findall(r"(?:https?|wss?|ftp)://([^\s\"'<>]+)", html)} == {"www.w3.org"}


def test_a_page_above_its_budget_says_what_it_leaves_out(run):
    whole = report(run).read_text(encoding="utf-8")
    assert "active subcomponents, the least important ones" not in whole
    size = len(whole.encode())
    document = json.loads((run / "analysis/catalogue.json").read_text())
    parts = sum(len(site["parts"]) for site in document["sites"].values())
    part = report(run, budget=(size - 1000) / 1e6).read_text(encoding="utf-8")
    found = re.search(r"token strips of (\d+) of (\d+) active subcomponents", part)
    assert found
    assert 0 < int(found[1]) <= parts == int(found[2])
    assert len(part.encode()) <= size - 1000
    assert "Even so, the page is larger" not in part
    least = report(run, budget=0.001).read_text(encoding="utf-8")
    assert int(re.search(r"token strips of (\d+)", least)[1]) == parts
    assert "Even so, the page is larger" in least
    with pytest.raises(ConfigError, match="budget 0"):
        report(run, budget=0)


def test_a_run_on_a_model_of_ones_own_names_no_command(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    batches = [torch.randn(3, 4)]
    run = decompose(model, batches, sites=["*"], C=3, steps=2, gamma={"kind": "vector"}, out=tmp_path / "own")
    html = report(run).read_text(encoding="utf-8")
    assert '"command": null' in html
    assert "model=model, batches=batches" in html
    assert "off the data" not in html


def test_a_run_with_all_that_is_beyond_the_paper_has_its_page(tmp_path):
    """A loss that begins later, merged subcomponents, a second stream and the remainder: as `induction-robust` and more."""
    losses = {"recon": 1.0, "adversarial": 1.0, "elsewhere": 1.0, "elsewhere_masks": "all", "smooth_minimality": 0.1}
    config = tiny_with(
        losses=losses, delta=True, merge={"every": 2}, steps=8, log_every=1, task=TINY["task"] | {"elsewhere": 2, "shuffled": 0.25}
    )
    found = decompose_config(config, out=tmp_path / "run")
    text = report(found.path).read_text(encoding="utf-8")
    assert "With the remainder Δ on as well it is " in text
    least, most = min(found.decomposition.C.values()), max(found.decomposition.C.values())
    assert f"sites with {least if least == most else f'{least} to {most}'} subcomponents each" in text
    figure = losses_figure(found.metrics)
    steps = {line.name: list(line.x) for line in figure.data}
    assert steps["recon"] == list(range(1, 9))
    assert steps["adversarial"] == list(range(4, 9))  # from 35 % of the steps on
    assert "adversarial" in found._repr_html_()


def test_verdicts_follow_the_figures(complete):
    numbers = json.loads((complete / "analysis/circuit.json").read_text())
    numbers["metrics"] |= {"recon": 0.009, "recon_rounded": 0.09, "recon_adversarial": 0.2, "faithfulness_relative": 1e-5}
    numbers["metrics"] |= {"accuracy_target": 1.0, "accuracy_masked": 0.9}
    target = {"converged": False, "checks": [{"accuracy": 0.5}]}
    found = {verdict.name: verdict for verdict in verdicts(numbers["metrics"], off_data=numbers["off_data"], target=target)}
    standings = {name: verdict.standing for name, verdict in found.items() if name != "off the data"}
    expected = {
        "target": "fails",
        "weights": "holds",
        "predictions": "holds",
        "on or off": "partly",
        "answers": "fails",
        "worst case": "fails",
    }
    assert standings == expected
    assert found["on or off"].figure == "0.09 nats"
    assert "target" not in {verdict.name for verdict in verdicts(numbers["metrics"])}


@contextmanager
def opened(page_file: Path, *, width: int = 1000, scheme: str = "light", part: str = "") -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page in a browser that has no network, what its console complains of, and every address it asks for."""
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS, timeout=LIMIT)
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        context.set_default_timeout(LIMIT)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri() + part)
        page.wait_for_selector("body[data-ready=true]")
        yield page, complaints, requests
        browser.close()


def require_quiet(page: Any, complaints: list[str], requests: list[str]) -> None:
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    fits = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert fits, "the page itself does not scroll sideways"


def saved(page: Any, button: Any) -> bytes:
    with page.expect_download() as download:
        button.click()
    page.wait_for_timeout(150)  # the browser drops every eleventh file of a hasty series
    return Path(download.value.path()).read_bytes()


def require_panel(page: Any, label: str) -> None:
    """The panel tells of the site that a cell or node is labelled with."""
    page.wait_for_function("label => label.startsWith(document.getElementById('panel-heading')?.textContent ?? ' ')", arg=label)


def click_everything(page: Any) -> None:
    """The cells of the first map and one of every other, every part of the last site, every node, menu, link, table and file."""
    cells = page.locator("#map-svg [role=button]").count()
    for i in range(0, cells, 1 + cells // 40):
        cell = page.locator("#map-svg [role=button]").nth(i)
        cell.click()
        require_panel(page, cell.get_attribute("aria-label"))
        assert cell.get_attribute("aria-pressed") == "true"
    for view in page.locator("#view option").all():
        page.select_option("#view", view.get_attribute("value"))
        page.locator("#map-svg [role=button]").last.click()
    for button in page.locator("#panel .parts button").all():
        button.click()
        assert f"#{button.get_attribute('data-part')}" in page.locator("#part h3").first.inner_text()
    assert page.locator("#part .strip span").count() > 0
    command = page.locator("#part code").first.inner_text()
    assert re.match(r"paramlens inspect \S+ --site \S+ --subcomponent \d+$", command)
    for node in page.locator("#circuit-svg [role=button]").all():
        node.click()
        require_panel(page, node.get_attribute("aria-label"))
        assert page.locator("#circuit #panel").count() == 1
    edges = page.locator("#circuit-svg .edge").count()
    page.select_option("#measure", "1")
    page.locator("#least").fill("1")
    assert page.locator("#circuit-svg .edge").count() < edges
    page.locator("#least").fill("0")
    for link in page.locator("nav a").all():
        link.click()
    for place in page.locator(".plot").all():
        place.scroll_into_view_if_needed()
        place.locator(".main-svg").first.wait_for()
    for details in page.locator("details > summary").all():
        details.click()
    assert page.locator("details[open] table tbody tr").count() > page.locator(".plot").count()
    page.locator("#theme").click()
    page.locator("#theme").click()


def require_files(page: Any) -> None:
    """Every figure as SVG, PNG and CSV."""
    for kind in ("SVG", "PNG", "CSV"):
        buttons = page.locator(f"[data-save={kind}]").all()
        assert len(buttons) >= page.locator(".plot").count() + 2
        for button in buttons:
            content = saved(page, button)
            if kind == "SVG":
                assert ET.fromstring(content.decode()).tag.endswith("svg")
            elif kind == "PNG":
                assert content.startswith(b"\x89PNG")
                assert len(content) > 1000
            else:
                rows = list(csv.reader(io.StringIO(content.decode())))
                assert len(rows) > 1
                assert len({len(row) for row in rows}) == 1


@needs_browser
@pytest.mark.parametrize(("which", "width", "scheme"), [("complete", 1000, "light"), ("facts", 400, "dark")])
@pytest.mark.slow
def test_every_element_of_a_page_answers(request, which: str, width: int, scheme: str):
    path = request.getfixturevalue(which)
    with opened(path / "report.html", width=width, scheme=scheme) as (page, complaints, requests):
        assert page.locator("html").get_attribute("data-theme") == scheme
        click_everything(page)
        if which == "complete":
            require_files(page)
        require_quiet(page, complaints, requests)
        sections = [section.get_attribute("id") for section in page.locator("section").all()]
    own = ["attention", "baseline", "seeds"] if which == "complete" else ["edits", "tracing"]
    assert sections == ["trust", "map", "circuit", "counts", *own, "training"]


@needs_browser
@pytest.mark.parametrize(("which", "width", "scheme"), [("complete", 400, "dark"), ("facts", 1000, "light")])
def test_pages_fit_their_width(request, which: str, width: int, scheme: str):
    with opened(request.getfixturevalue(which) / "report.html", width=width, scheme=scheme) as (page, complaints, requests):
        page.locator("#map-svg [role=button]").first.click()
        require_quiet(page, complaints, requests)


@needs_browser
def test_the_page_works_from_the_keyboard(complete):
    with opened(complete / "report.html") as (page, complaints, requests):
        page.locator("#view").focus()
        page.keyboard.press("Tab")
        for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft"):
            page.keyboard.press(key)
        assert page.evaluate("[document.activeElement.dataset.row, document.activeElement.dataset.column]") == ["1", "1"]
        page.keyboard.press("Enter")
        page.wait_for_selector("#panel .parts button:focus")
        assert page.locator("#panel-heading").inner_text() == "blocks.0.attn.k"
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        focused = page.evaluate("document.activeElement.dataset.part")
        assert f"#{focused}" in page.locator("#part h3").first.inner_text()
        page.locator("#circuit-svg [role=button]").nth(4).focus()
        page.keyboard.press("Enter")
        require_panel(page, "blocks.1.attn.k")
        reached = page.evaluate("[...document.querySelectorAll('a, button, select, input, summary')].every(e => e.tabIndex >= 0)")
        assert reached
        require_quiet(page, complaints, requests)


@needs_browser
def test_an_address_opens_a_part(facts):
    with opened(facts / "report.html", part="#part=transformer.h.0.mlp.c_fc,3") as (page, complaints, requests):
        assert page.locator("#part h3").first.inner_text() == "h.0.mlp.c_fc #3"
        require_quiet(page, complaints, requests)


@needs_browser
@pytest.mark.slow
def test_a_click_shows_the_first_of_many_parts_and_all_when_asked(tmp_path):
    """All of 128 and more parts a site active, at facts-small's sixteen sites. How fast: benchmarks/clicks.py."""
    miniature = {"blocks": 4, "width": 32, "heads": 2, "steps": 2, "batch": 8, "check_every": 2}
    task = {"kind": "facts", "miniature": miniature}
    config = make_config(TINY_FACTS | {"C": 132, "steps": 2, "task": task, "evaluate": {"every": 2, "batches": 1}, "log_every": 1})
    run = decompose_config(config, out=tmp_path / "run")
    page_file = report(run)
    document = json.loads((tmp_path / "run/analysis/catalogue.json").read_text())
    assert len(document["sites"]) == 16
    assert min(len(site["parts"]) for site in document["sites"].values()) >= 128
    with opened(page_file) as (page, complaints, requests):
        for row in range(16):
            page.evaluate("([row, column]) => chooseCell(row, column)", [row, row % 5])
        page.mouse.wheel(0, 20_000)
        assert page.locator("#panel .parts li").count() == 40
        page.get_by_role("button", name=re.compile(r"^all \d+$")).click()
        assert page.locator("#panel .parts li").count() >= 128
        require_quiet(page, complaints, requests)
    assert page_file.stat().st_size < 8e6


@needs_browser
def test_a_token_that_is_a_tag_shows_as_text(run):
    """In tables, figures and what scripts draw; a script that got in all the same would not run."""
    token = "<script>document.title='owned'</script>"
    link = "<a href='https://example.org'>x</a>&lt;"
    for name in ("model", "analysis/circuit", "analysis/catalogue", "analysis/edges"):
        file = run / f"{name}.json"
        text = file.read_text().replace('"m"', json.dumps(token)).replace('"s"', json.dumps(token))
        file.write_text(text.replace("blocks.1.attn.v", link))
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"target": info["target"] | {"id": token}}))
    with opened(report(run)) as (page, complaints, requests):
        page.select_option("#view", "4")
        page.locator("#map-svg [role=button]").last.click()
        page.locator("#plot-attention").scroll_into_view_if_needed()
        page.locator("#plot-attention .main-svg").first.wait_for()
        shown = page.inner_text("body")
        drawn = page.eval_on_selector_all("#plot-attention text, #plot-roleattention text", "texts => texts.map(text => text.textContent)")
        links = page.eval_on_selector_all("main a, section a", "links => links.length")
        strip = page.locator("#part .strip").first.inner_text()
        title = page.title()
        page.evaluate("() => { const s = document.createElement('script'); s.textContent = 'document.title=1'; document.body.append(s) }")
        assert page.title() == title
    assert title == "tiny: ParamLens"
    assert token in shown
    assert token in strip
    assert any(token in text for text in drawn)
    assert link in shown
    assert links == 0
    assert len(complaints) == 1
    assert "Content Security Policy" in complaints[0]
    assert len(requests) == 1


def test_an_svd_of_an_older_checkpoint_is_left_out(run):
    assert "plot-svd" in report(run).read_text(encoding="utf-8")
    file = run / "analysis/svd.json"
    file.write_text(file.read_text().replace('"step": 12', '"step": 8'))
    assert "plot-svd" not in report(run).read_text(encoding="utf-8")
