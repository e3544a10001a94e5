"""The result of a command: one JSON document, or tables and lines of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from paramlens.display.tables import Table
from paramlens.display.terminal import print_tables
from paramlens.files.plain import json_line


@dataclass(frozen=True)
class Outcome:
    """The result of a command. shown: tables, and lines that a terminal wraps but never cuts."""

    document: Mapping[str, Any]
    shown: Sequence[Table | str] = ()
    exit_code: int = 0

    def print(self, *, as_json: bool) -> None:
        """Print `document` or `shown` on stdout."""
        if as_json:
            print(json_line(self.document))
            return
        for i, part in enumerate(self.shown):
            if isinstance(part, str):
                Console().print(part, highlight=False, markup=False, soft_wrap=True)
            else:
                print_tables([part], after=i > 0)
