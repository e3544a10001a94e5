"""Pages of what a run directory may hold and nobody planned for."""

import base64
import gzip
import json
import re

import pytest

from paramlens.page import report
from paramlens.shipped import example


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
