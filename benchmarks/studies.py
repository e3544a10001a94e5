"""What studies of many runs share: each run is measured once, and a study that was stopped goes on where it was."""

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paramlens.files.plain import read_json, write_json


def each_once(results: Path, measures: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Call every function whose name is not among the runs of a JSON file yet, and add what it returns there under its name."""
    found = read_json(results) if results.is_file() else {"machine": f"{platform.system()} {platform.machine()}, one thread", "runs": {}}
    for name, measure in measures.items():
        if name not in found["runs"]:
            print(name, flush=True)
            found["runs"][name] = measure()
            write_json(results, found)
