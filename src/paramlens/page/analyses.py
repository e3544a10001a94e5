"""The analyses that a page shows: those of the run directory, and what it cannot do without, made where it is missing."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramlens.config import FactsTask
from paramlens.configfile import load_config
from paramlens.layout import checkpoint_step, find_checkpoint, read_json

if TYPE_CHECKING:
    from paramlens.rundir import Run

_READ = {"sites", "metrics", "attention_kl", "attention_by_role", "interventions", "maps", "example", "off_data"}
"""What the page reads of a circuit; one written by an earlier version has less, and is made again."""

_SHOWN = ("svd", "suppress", "trace", "agreement")
"""Shown where the run has them."""


class Analyses:
    """A run's analyses by name; circuit, catalogue, edges and inspect are made where they are missing, older than the run or unlike.

    Raises `RunDirError` as `open_run` does if something has to be made.
    """

    def __init__(self, run: "Run | str | Path", path: Path) -> None:
        self._run, self._path = run, path
        self.kept = {name: self._current(name) for name in _SHOWN}

    def __getitem__(self, name: str) -> dict[str, Any]:
        document = self._current(name)
        if document is not None and self._serves(name, document):
            return document
        self._opened.save_analysis(name, self._made(name))
        return read_json(self._file(name))

    def _file(self, name: str) -> Path:
        return self._path / "analysis" / f"{name}.json"

    def _current(self, name: str) -> dict[str, Any] | None:
        """None if it is missing or of an older checkpoint."""
        document = read_json(self._file(name)) if self._file(name).is_file() else None
        return document if document and document["step"] == checkpoint_step(find_checkpoint(self._path, None)) else None

    def _serves(self, name: str, document: dict[str, Any]) -> bool:
        """Whether it has all that the page reads, of the run's sentences, and counts as active what the circuit does."""
        if name == "circuit":
            return document.keys() >= _READ
        if name == "inspect":
            return {each["prompt"] for each in document["prompts"]} == set(self._sentences)
        return document["threshold"] == self["circuit"]["threshold"]

    @cached_property
    def _opened(self) -> "Run":
        from paramlens.rundir import open_run

        return open_run(self._run) if isinstance(self._run, str | Path) else self._run

    @property
    def _sentences(self) -> tuple[str, ...]:
        task = load_config(self._path / "config.yaml").task
        return task.sentences if isinstance(task, FactsTask) else ()

    def _made(self, name: str) -> dict[str, Any]:
        run = self._opened
        if name == "circuit":
            from paramlens.analysis.circuit import circuit

            return dict(circuit(run).to_json())
        threshold = self["circuit"]["threshold"]
        if name == "inspect":
            from paramlens.analysis.components import inspect_prompt

            prompts = [inspect_prompt(run, sentence, threshold=threshold).to_json() for sentence in self._sentences]
            return {"step": run.step, "prompts": prompts}
        from paramlens.analysis.catalogue import catalogue
        from paramlens.analysis.edges import edges

        return dict({"catalogue": catalogue, "edges": edges}[name](run, threshold=threshold).to_json())
