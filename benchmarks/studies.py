"""What studies share: the sites of the induction head; each run is measured once, and a study that was stopped goes on where it was."""

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paramlens.files.plain import read_json, write_json

HOME = {"0.attn.q": "m", "0.attn.k": "s1", "0.attn.v": "s1", "1.attn.q": "s2", "1.attn.k": "m", "1.attn.v": "m"}
"""Site of the induction head, after `blocks.` → the role at which the paper's circuit reads it (Table 1a)."""
SHORT = {site: f"{site[-1].upper()}{site[0]}" for site in HOME}
"""Site → its name in the paper's tables, such as Q0."""


def each_once(results: Path, measures: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Call every function whose name is not among the runs of a JSON file yet, and add what it returns there under its name."""
    found = read_json(results) if results.is_file() else {"machine": f"{platform.system()} {platform.machine()}, one thread", "runs": {}}
    for name, measure in measures.items():
        if name not in found["runs"]:
            print(name, flush=True)
            found["runs"][name] = measure()
            write_json(results, found)
