"""Every result as its tables, in a terminal of 80 columns and in a notebook: whole, escaped, and asking nothing of the network."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from paramlens import open_run
from paramlens.analysis.agreement import agreement
from paramlens.analysis.circuit import circuit
from paramlens.analysis.components import Subcomponent, inspect_prompt, inspect_subcomponent
from paramlens.analysis.edit import suppress
from paramlens.analysis.effect import evaluate_edit
from paramlens.analysis.trace import trace
from paramlens.baselines import bench
from paramlens.baselines.svd import svd_baseline
from paramlens.cli.main import main
from paramlens.display.result import Result, html
from paramlens.display.tables import Cell, Chart, Column, Line, Table, columns, row, shaded, visible
from paramlens.display.terminal import print_tables
from paramlens.runs.budget import Footprint, diagnose
from paramlens.runs.verification import verify
from test_page import CHROMIUM, FLAGS, needs_browser

KOBE = "Kobe Bryant plays the sport of basketball"
FC = "transformer.h.0.mlp.c_fc"


@pytest.fixture(scope="module")
def results(tiny_run, facts_run) -> dict[str, Result]:
    edit = suppress(facts_run, unique_to=KOBE, threshold=0.3)
    task = facts_run.task
    return {
        "run": tiny_run,
        "facts run": facts_run,
        "decomposition": facts_run.decomposition,
        "circuit": circuit(tiny_run, batches=1, adversary=1),
        "facts circuit": circuit(facts_run, batches=1, adversary=0),
        "svd": svd_baseline(tiny_run, batches=1),
        "agreement": agreement([tiny_run, tiny_run], batches=1),
        "inspection": inspect_prompt(facts_run, None),
        "subcomponent": inspect_subcomponent(facts_run, FC, 3),
        "edit": edit,
        "suppression": evaluate_edit(facts_run, edit, KOBE),
        "trace": trace(task.model, task.tokenizer, "Tiger Woods plays the sport of", "Tiger Woods", answer="golf", samples=2, name="tiny"),
        "verification": verify(tiny_run.path),
        "diagnosis": diagnose(facts_run.config, facts_run.decomposition.sites, Footprint(2, 9, 300)),
    }


NAMES = [
    "run",
    "facts run",
    "decomposition",
    "circuit",
    "facts circuit",
    "svd",
    "agreement",
    "inspection",
    "subcomponent",
    "edit",
    "suppression",
    "trace",
    "verification",
    "diagnosis",
]


def printed(tables, width: int = 80, **how: Any) -> str:
    stream = io.StringIO()
    print_tables(tables, Console(file=stream, width=width, **how))
    return stream.getvalue()


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def require_whole(tables, width: int = 80) -> None:
    """No line is too long, nothing is cut: every number stands in one piece, every name does but for the end of a line."""
    shown = printed(tables, width)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    assert "…" not in shown
    firsts = "".join(re.split(r"\s{2,}", line.strip())[0] for line in shown.splitlines())
    words = shown.split()
    for table in tables:
        for cells in table.rows:
            for i, (cell, column) in enumerate(zip(cells, table.columns, strict=True)):
                if column.right:
                    assert all(word in words for word in visible(cell.text).split()), cell.text
                elif i == 0:
                    assert squeezed(cell.text) in squeezed(firsts), cell.text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [80, 50])
def test_a_terminal_shows_all_of_it(results, name: str, width: int):
    require_whole(results[name].tables(), width)


@pytest.mark.parametrize("name", NAMES)
def test_long_names_and_twenty_tokens_come_in_blocks(results, name: str):
    tables = []
    for table in results[name].tables():
        count = 20 if len(table.columns) > 4 else len(table.columns) - 1
        if not table.rows or any(column.wraps for column in table.columns):
            count = len(table.columns) - 1
        more = [1 + i % (len(table.columns) - 1) for i in range(count)] if table.columns[1:] else []
        long = "" if table.columns and table.columns[0].right else "model.layers.12.self_attn.q_proj."
        rows = [(replace(cells[0], text=f"{long}{cells[0].text}"), *(cells[i] for i in more)) for cells in table.rows]
        tables.append(replace(table, columns=(*table.columns[:1], *(table.columns[i] for i in more)), rows=tuple(rows)))
    require_whole(tables)


def test_a_table_too_wide_is_shown_in_blocks_each_with_its_names():
    heads = columns("site", *(f"token{i}" for i in range(20)))
    table = Table("t", heads, ((Cell("model.layers.12.self_attn.q_proj"), *(Cell(str(i)) for i in range(20))),))
    shown = printed([table])
    assert shown.count("model.layers.12.self_attn.q_proj") == shown.count("site") > 2
    assert re.findall(r"token\d+", shown) == [f"token{i}" for i in range(20)]


def test_the_bench_fits():
    case = bench.Measured(
        importance="attention", length=10240, batch=256, C=400, sites=24, threads=16, repeats=7,
        naive_steps_per_s=1234.567, steps_per_s=12345.678, ratio=1234.56, naive_peak_bytes=90_000 * 2**20, peak_bytes=90_000 * 2**20,
    )  # fmt: skip
    require_whole([bench.bench_table(bench.document([case, bench.Measured()]))])


def test_damage_is_told_in_full(tiny_run, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(tiny_run.path, place)
    (place / "checkpoints" / "step-00000012" / "components.safetensors").write_bytes(b"damaged")
    found = verify(place)
    assert not found.whole
    require_whole(found.tables())
    [problem] = found.checkpoints[-1].problems
    assert squeezed(problem) in squeezed(printed(found.tables(), width=400))
    assert "damaged" in printed(found.tables())


def test_counts_are_shaded_by_value_where_the_console_has_colour(results, monkeypatch):
    tables = results["inspection"].tables()
    plain = printed(tables)
    assert "\x1b" not in plain
    coloured = printed(tables, force_terminal=True, color_system="truecolor")
    grounds = set(re.findall(r"48;2;(\d+);", coloured))
    counts = {count for counts in results["inspection"].by_site.values() for count in counts if count}
    assert len(grounds) == len(counts) > 1
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert "48;2;" not in printed(tables, force_terminal=True, color_system="truecolor")


def test_control_characters_do_nothing():
    table = Table("title \x1b[31m", columns("a", "\x1b[2J"), (row("\x1b]0;x\x07", "1"),), notes=(Cell("\x9b1m"),))
    for shown in (printed([table]), html([table])):
        assert not set("\x1b\x07\x9b") & set(shown)


class _Tags(HTMLParser):
    """Raises unless every tag is closed in order; keeps tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)


def parsed(text: str) -> _Tags:
    tags = _Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    return tags


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_all_of_it(results, name: str):
    result = results[name]
    text = result._repr_html_()
    tags = parsed(text)
    said = "".join(tags.text) + " ".join(attributes.get("title") or "" for _, attributes in tags.tags)
    for table in result.tables():
        for cells in table.rows:
            assert all(cell.text in said for cell in cells)
        if table.headed:
            assert all(column.name.strip() in said for column in table.columns)
    for tag, attributes in tags.tags:
        assert tag not in ("script", "link", "img", "iframe", "style")
        assert not {"src", "href", "class", "onclick"} & attributes.keys()
        assert "url(" not in (attributes.get("style") or "")


@pytest.mark.parametrize("name", NAMES)
def test_one_short_line_says_what_it_is(results, name: str):
    said = repr(results[name])
    assert said.startswith(f"{type(results[name]).__name__}(")
    assert "\n" not in said
    assert len(said.replace(str(getattr(results[name], "path", "")), "").replace(str(getattr(results[name], "run", "")), "")) <= 140


SCRIPT = "<script>alert('x')</script>"


def test_text_stays_text(results):
    part = replace(results["subcomponent"], tokens=[[SCRIPT, " & so"]], importance=[[0.5, 0.25]], inner=[[1.5, -0.25]])
    found = replace(results["inspection"], prompt=SCRIPT, tokens=[SCRIPT] * len(results["inspection"].tokens))
    chart = Chart(SCRIPT, SCRIPT, SCRIPT, (Line(SCRIPT, ((0.0, 1.0), (1.0, 2.0))),))
    for text in (part._repr_html_(), found._repr_html_(), html((), [chart])):
        tags = parsed(text)
        assert "script" not in {tag for tag, _ in tags.tags}
        assert SCRIPT in "".join(tags.text)


def test_tokens_of_a_sentence_are_spans_by_importance(results):
    part = results["subcomponent"]
    assert isinstance(part, Subcomponent)
    spans = [attributes for tag, attributes in parsed(part._repr_html_()).tags if tag == "span"]
    pairs = [pair for values in zip(part.importance, part.inner, strict=True) for pair in zip(*values, strict=True)]
    assert [span["title"] for span in spans] == [f"importance {g:.2f}, inner {inner:+.2f}" for g, inner in pairs]
    grounds = [float(found[1]) if (found := re.search(r"rgba\(.*,([\d.]+)\)", span["style"] or "")) else 0.0 for span in spans]
    assert grounds == pytest.approx([0.75 * g for g, _ in pairs], abs=0.006)


def test_a_run_is_shown_from_its_small_files_alone(tiny_run, monkeypatch):
    run = open_run(tiny_run.path)
    for name in ("open_run", "load_parameters", "require_whole"):
        monkeypatch.setattr(f"paramlens.runs.rundir.{name}", None)
    text = run._repr_html_()
    last = [line for line in run.metrics if "losses" in line][-1]
    for value in last["losses"].values():
        assert f"{value:.2e}" in text
    assert text.count("<polyline") == len(last["losses"])
    for word in ("finished", "attention", "5 subcomponents a site", "12 of 12", "tiny toy target"):
        assert word in text


def test_a_run_without_metrics_yet(tiny_run, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(tiny_run.path, place)
    (place / "metrics.jsonl").write_text("")
    text = open_run(place)._repr_html_()
    assert "svg" not in text
    assert "finished" in text


def test_shade_of_a_number():
    assert shaded("0.000", 0.0, 2.0) == Cell("0.000", "faint", 0.0)
    assert shaded("1.0", 1.0, 2.0) == Cell("1.0", "plain", 0.5)
    assert shaded("3", 3.0, 2.0).level == 1.0
    assert shaded("0", 0.0, 0.0).level == 0.0


def test_prose_takes_what_is_left():
    table = Table("", (Column("name", right=False), Column("said", right=False, wraps=True)), (row("a", "word " * 60),))
    lines = printed([table]).splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).split().count("word") == 60


@pytest.mark.parametrize("words", [["report", "RUN"], ["verify", "RUN"], ["circuit", "RUN", "--batches", "1", "--adversary", "0"]])
def test_json_is_one_document(words, tiny_run, tmp_path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(tiny_run.path, tmp_path / "run")
    place = str(tmp_path / "run")
    if words[0] == "report":
        run = open_run(place)
        run.save_analysis("circuit", circuit(run, batches=1).to_json())
    assert main([place if word == "RUN" else word for word in words] + ["--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    if words[0] == "report":
        assert document == {"page": f"{place}/report.html"}


@pytest.fixture
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()


@needs_browser
def test_in_a_browser_nothing_is_asked_for_and_the_page_keeps_its_width(results, tmp_path, browser):
    for ground, ink in (("#ffffff", "#000000"), ("#111111", "#eeeeee")):
        body = "".join(result._repr_html_() for result in results.values())
        file = tmp_path / "page.html"
        file.write_text(f'<meta charset="utf-8"><body style="background:{ground};color:{ink}">{body}</body>', encoding="utf-8")
        page = browser.new_page(viewport={"width": 500, "height": 800})
        requests: list[str] = []
        page.on("request", lambda request, seen=requests: seen.append(request.url))
        page.goto(file.as_uri())
        assert requests == [file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.locator("svg").count() == 3
        assert page.evaluate("getComputedStyle(document.querySelector('td')).color") == f"rgb({', '.join([str(int(ink[1:3], 16))] * 3)})"
        page.close()
