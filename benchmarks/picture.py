"""Picture of a place on a run's page, by headless Chromium.

    python benchmarks/picture.py RUN PLACE OUT.png [ROW COLUMN]

PLACE: the first screen (page), a section (trust, map, circuit), what a click on a cell of the map opens (panel), or a figure by its
name (losses, patterns, svd, suppress-0, ...: the ids `plot-...` of the page). ROW, COLUMN: the cell clicked before, in the first view.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from paramlens import report

CHROMIUM = "/usr/bin/chromium"


def main(run: str, place: str, out: str, *cell: str) -> None:
    page_file = report(run)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
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


if __name__ == "__main__":
    main(*sys.argv[1:])
