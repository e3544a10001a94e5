"""Picture of one figure of a run's page, by headless Chromium.

    python benchmarks/picture.py RUN FIGURE OUT.png

FIGURE: roles, maps, example, patterns, roleattention, attention, svd, losses or target; svd needs `paramlens svd RUN` before.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from paramlens import report

CHROMIUM = "/usr/bin/chromium"


def main(run: str, figure: str, out: str) -> None:
    page_file = report(run)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 900, "height": 700}, device_scale_factor=2)
        page.goto(page_file.absolute().as_uri())
        page.wait_for_selector("body[data-ready=true]")
        page.wait_for_timeout(500)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        page.locator(f"#plot-{figure}").screenshot(path=out)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
