"""Picture of a place on a run's page, by headless Chromium; and of any Plotly figure, for the other benchmarks.

    python benchmarks/picture.py RUN PLACE OUT.png [ROW COLUMN]

PLACE: the first screen (page), a section (trust, map, circuit), what a click on a cell of the map opens (panel), or a figure by its
name (losses, patterns, svd, suppress-0, ...: the ids `plot-...` of the page). ROW, COLUMN: the cell clicked before, in the first view.
"""

import json
import sys
from base64 import b64decode
from pathlib import Path
from urllib.parse import unquote

import plotly.graph_objects as go
from playwright.sync_api import sync_playwright
from plotly.offline import get_plotlyjs

from paramlens import report

CHROMIUM = {"executable_path": "/usr/bin/chromium", "args": ["--no-sandbox", "--disable-gpu"]}


def main(run: str, place: str, out: str, *cell: str) -> None:
    page_file = report(run)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**CHROMIUM)
        page = browser.new_page(viewport={"width": 1000, "height": 1250}, device_scale_factor=1.5)
        page.goto(page_file.absolute().as_uri())
        page.wait_for_selector("body[data-ready=true]")
        if cell:
            page.locator(f"#map-svg [data-row='{cell[0]}'][data-column='{cell[1]}']").click()
            page.wait_for_selector("#part")
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        if place == "page":
            page.screenshot(path=out)
        else:
            figure = page.locator(f"#plot-{place}")
            wanted = figure if figure.count() else page.locator(f"#{place}")
            wanted.scroll_into_view_if_needed()
            page.wait_for_timeout(500)
            wanted.screenshot(path=out)
        browser.close()


def save_figure(figure: go.Figure, out: Path, *, width: int, height: int) -> None:
    """Write a Plotly figure as `.svg` or `.png`; width, height: in pixels."""
    figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 40, "b": 40},
        legend={"orientation": "h", "y": 1.04, "yanchor": "bottom"}
        if not figure["layout"]["annotations"]
        else {"orientation": "h", "y": -0.2},
        font={"family": "system-ui, sans-serif", "size": 12},
    )
    draw = "([figure, how]) => Plotly.newPlot('figure', figure).then((made) => Plotly.toImage(made, how))"
    how = {"format": out.suffix.removeprefix("."), "width": width, "height": height}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**CHROMIUM)
        page = browser.new_page()
        page.set_content(f'<div id="figure"></div><script>{get_plotlyjs()}</script>')
        head, _, body = page.evaluate(draw, [json.loads(str(figure.to_json())), how]).partition(",")
        browser.close()
    out.write_bytes(b64decode(body) if head.endswith(";base64") else unquote(body).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
