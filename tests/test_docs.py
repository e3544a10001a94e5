"""The documentation: it builds without a warning, is complete in itself, and what it prints exists."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import paramlens
from paramlens.cli.main import parsed
from paramlens.cli.parameters import overrides
from paramlens.config.file import load_config
from paramlens.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
PLACEHOLDERS = {"CONFIG": "induction-quick", "N": "1"}
"""Words of a printed command that stand for a value which is read while it is parsed."""
CHROMIUM = Path("/usr/bin/chromium")
LIMIT = 3_600_000.0
"""Milliseconds after which the browser hangs."""
EXTERNAL = re.compile(r"(https?:)?//", re.IGNORECASE)


class Page(HTMLParser):
    """What a built page loads, what it links to, and the places in it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.places |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a":
            self.links += [values["href"]] if "href" in values else []
        else:
            self.loaded += [values[name] for name in ("src", "href", "data", "poster", "srcset") if name in values]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by a process of its own, where mkdocs' warnings are errors by --strict and those of its libraries are left to them."""
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {str(path.relative_to(site)): Page(path) for path in sorted(site.rglob("*.html"))}


def test_no_page_asks_another_host_for_anything(site: Path, pages: dict[str, Page]):
    assert {"index.html", "quickstart.html", "api/public.html"} <= set(pages)
    assert {name: outside for name, page in pages.items() if (outside := [url for url in page.loaded if EXTERNAL.match(url)])} == {}
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\s]+", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed, so no browser searches the site")
@pytest.mark.slow
def test_the_search_works_from_disk_and_asks_nobody(site: Path):
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"], timeout=LIMIT)
        page = browser.new_page()
        page.set_default_timeout(LIMIT)
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "quickstart.html").as_uri())
        page.click("input.md-search__input")
        page.keyboard.type("faithfulness")
        first = page.wait_for_selector(".md-search-result__link")
        assert first is not None
        assert "html" in (first.get_attribute("href") or "")
        browser.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "about:"))] == []


def test_every_public_name_has_an_entry(pages: dict[str, Page]):
    names = {f"paramlens.{name}" for name in paramlens.__all__ if name != "__version__"}
    assert names - pages["api/public.html"].places == set()


def test_every_link_within_the_site_leads_somewhere(site: Path, pages: dict[str, Page]):
    broken = []
    for name, page in pages.items():
        if name == "404.html":  # its links are of the site's root, wherever that is
            continue
        for url in map(urlsplit, page.links + page.loaded):
            if url.scheme or url.netloc:
                continue
            path = (site / name).parent.joinpath(unquote(url.path)).resolve() if url.path else site / name
            place = unquote(url.fragment)
            inside = pages.get(str(path.relative_to(site)))
            if not path.is_file() or (place and not place.startswith("__") and inside and place not in inside.places):
                broken.append(f"{name}: {url.geturl()}")
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_and_image_is_in_the_repository(page: Path):
    text = re.sub(r"(?m)^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [urlsplit(url) for url in re.findall(r"\]\(([^)\s]+)\)", text)]
    files = [page.parent / unquote(link.path) for link in links if not link.scheme and link.path]
    assert [file for file in files if not file.is_file()] == []


def printed_commands(text: str) -> list[str]:
    """`paramlens ...` at the start of a code block's line, continuations joined, or set as code; `paramlens NAME` alone is a name."""
    text = re.sub(r" *\\\n\s*", " ", text)
    blocks = re.findall(r"(?m)^ {4,}(?:\$ )?(?:\.venv/bin/)?(paramlens .*)$", text)
    for fence in re.findall(r"(?ms)^```(?!python)\w*\n(.*?)^```$", text):
        blocks += re.findall(r"(?m)^(?:\$ )?(?:\.venv/bin/)?(paramlens .*)$", fence)
    inline = re.findall(r"`(paramlens [^`]+)`", re.sub(r"(?ms)^```.*?^```$", "", text))
    return blocks + [command if len(command.split()) > 2 else f"{command} --help" for command in inline]


def refused(command: str) -> str | None:
    """What the command line says against a command, which is read to the end, its configuration made, and not run."""
    own = itertools.takewhile(lambda word: word not in ("|", ">", "&&"), shlex.split(command, comments=True)[1:])
    words = [PLACEHOLDERS.get(word, word) for word in own]
    try:
        _, bound = parsed(words)
        if "config" in bound.arguments:
            load_config(bound.arguments["config"], overrides=overrides(bound.arguments))
    except ConfigError as error:
        return str(error)
    return None


def test_a_command_that_does_not_parse_is_seen():
    block = "    paramlens decompose induction-quick \\\n      --steps 3  # so\n"
    text = f"# x\n{block}\nand `paramlens circuit RUN` or `paramlens svd`\n```\nparamlens demo\n```\n"
    assert printed_commands(text) == [
        "paramlens decompose induction-quick --steps 3  # so",
        "paramlens demo",
        "paramlens circuit RUN",
        "paramlens svd --help",
    ]
    for command in printed_commands(text):
        assert refused(command) is None
    for wrong in ("decompse CONFIG", "circuit RUN --thresold 0.1", "decompose CONFIG --optim.rate 3", "decompose no-such-config"):
        assert refused(f"paramlens {wrong}")


def test_every_printed_command_parses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    commands = {command: page for page in PAGES for command in printed_commands(page.read_text(encoding="utf-8"))}
    assert len(commands) > 20
    assert {f"{page.name}: {command}": complaint for command, page in commands.items() if (complaint := refused(command))} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_python_block_compiles(page: Path):
    for block in re.findall(r"(?ms)^```python\n(.*?)^```$", page.read_text(encoding="utf-8")):
        compile(block, str(page), "exec")
