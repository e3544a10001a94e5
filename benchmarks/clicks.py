"""Milliseconds from a click on a cell of a run's map to the panel that answers it, by headless Chromium: first clicks, all sites.

python benchmarks/clicks.py RUN
"""

import sys
from statistics import median

from playwright.sync_api import sync_playwright

from paramlens import report

CHROMIUM = "/usr/bin/chromium"
CLICK = """async ([row, column]) => {
    const began = performance.now();
    await chooseCell(row, column);
    document.body.offsetHeight;
    return performance.now() - began;
}"""


def main(run: str) -> None:
    page_file = report(run)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.goto(page_file.absolute().as_uri())
        page.wait_for_selector("body[data-ready=true]")
        rows = page.evaluate("new Set([...document.querySelectorAll('#map-svg [data-row]')].map(cell => cell.dataset.row)).size")
        times = [page.evaluate(CLICK, [row, 0]) for row in range(rows)]
        browser.close()
    print(f"{rows} first clicks: median {median(times):.0f} ms, slowest {max(times):.0f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
