"""The analyses that a page shows: those in the run directory, and the required ones, computed if they are missing."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramlens.config.file import load_config
from paramlens.files.plain import read_json
from paramlens.runs.layout import MOST_ANALYSIS, checkpoint_step, find_checkpoint

if TYPE_CHECKING:
    from paramlens.runs.rundir import Run

_READ = {
    "circuit": {"threshold", "sites", "metrics", "attention_kl", "attention_by_role", "interventions", "maps", "example", "off_data"},
    "catalogue": {"counts", "threshold", "masked", "tokens", "roles", "sites"},
    "edges": {"threshold", "edges"},
    "inspect": {"prompts"},
}
"""Required analysis → keys that the page reads. An analysis without them, such as one of an earlier version, is computed again."""


class Analyses:
    """A run's analyses by name. circuit, catalogue, edges and inspect are computed if they are missing, older than the run or unfit.

    Raises `RunDirError` as `open_run` does if an analysis has to be computed.
    """

    def __init__(self, run: "Run | str | Path", path: Path) -> None:
        self._run, self._path = run, path
        newest = checkpoint_step(find_checkpoint(path, None))  # all analyses shown are of this one, even if the run goes on
        self._step = newest if isinstance(run, str | Path) else run.step
        self._read: dict[str, dict[str, Any]] = {}

    def get(self, name: str) -> dict[str, Any] | None:
        """A required analysis, computed if it is missing; or another one from the run directory. None: it is missing or older."""
        return self[name] if name in _READ else self._current(name)

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self._read:
            document = self._current(name)
            if document is None or not document.keys() >= _READ[name] or not self._serves(name, document):
                self._opened.save_analysis(name, self._made(name))
                document = read_json(self._file(name), most=MOST_ANALYSIS)
            self._read[name] = document
        return self._read[name]

    def _file(self, name: str) -> Path:
        return self._path / "analysis" / f"{name}.json"

    def _current(self, name: str) -> dict[str, Any] | None:
        """The analysis in the run directory. None: it is missing or of another checkpoint."""
        document = read_json(self._file(name), most=MOST_ANALYSIS) if self._file(name).is_file() else None
        return document if document and document.get("step") == self._step else None

    def _serves(self, name: str, document: dict[str, Any]) -> bool:
        """True if it is of the run's own sentences or sites, and has the circuit's threshold."""
        if name == "inspect":
            return {each["prompt"] for each in document["prompts"]} == set(self._sentences)
        if name == "edges":
            named = {edge[end] for edge in document["edges"] for end in ("source", "target")}
            return named <= self._sites and document["threshold"] == self._threshold
        return document["sites"].keys() == self._sites and (name == "circuit" or document["threshold"] == self._threshold)

    @cached_property
    def _sites(self) -> set[str]:
        return {site["name"] for site in read_json(self._path / "model.json")["sites"]}

    @property
    def _threshold(self) -> float:
        return self["circuit"]["threshold"]

    @cached_property
    def _opened(self) -> "Run":
        from paramlens.runs.rundir import open_run

        return open_run(self._run, checkpoint=self._step) if isinstance(self._run, str | Path) else self._run

    @property
    def _sentences(self) -> tuple[str, ...]:
        return load_config(self._path / "config.yaml").task.own_sentences

    def _made(self, name: str) -> dict[str, Any]:
        run = self._opened
        if name == "circuit":
            from paramlens.analysis.circuit import circuit

            return dict(circuit(run).to_json())
        if name == "inspect":
            from paramlens.analysis.components import inspect_prompt

            prompts = [inspect_prompt(run, sentence, threshold=self._threshold).to_json() for sentence in self._sentences]
            return {"step": run.step, "prompts": prompts}
        from paramlens.analysis.catalogue import catalogue
        from paramlens.analysis.edges import edges

        return dict({"catalogue": catalogue, "edges": edges}[name](run, threshold=self._threshold).to_json())
