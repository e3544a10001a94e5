"""The command `inspect`: active subcomponents by token, or a single one. The page shows the counts for the run's own sentences."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramlens.analysis.analysis import Analysis
from paramlens.display.outcome import Outcome
from paramlens.errors import ConfigError
from paramlens.method.threshold import ACTIVE

if TYPE_CHECKING:
    from paramlens.runs.rundir import Run


class InspectAnalysis(Analysis):
    name = "inspect"

    def compute(
        self,
        run: "Run",
        *,
        prompt: str | None = None,
        site: str | None = None,
        subcomponent: int | None = None,
        text: Path | None = None,
        threshold: float = ACTIVE,
    ) -> Outcome:
        """Show which subcomponents are active on which token; with --site and --subcomponent, what one reads and writes.

        Args:
            run: Run directory.
            prompt: A sentence. Defaults to the run's first sentence.
            site: Site of the subcomponent to show.
            subcomponent: Its number, 0 to C - 1.
            text: Text file; the subcomponent is shown on its lines. Defaults to the run's sentences.
            threshold: A subcomponent is active where its importance exceeds this, in [0, 1).
        """
        from paramlens.analysis.components import inspect_prompt, inspect_subcomponent
        from paramlens.tasks.reading import read_lines

        if (site is None) != (subcomponent is None):
            raise ConfigError("inspect: give --site and --subcomponent together, or neither")
        if site is not None and subcomponent is not None:
            texts = [prompt] if prompt else read_lines(text, f"text {text}") if text else ()
            result = inspect_subcomponent(run, site, subcomponent, texts=texts)
        else:
            result = inspect_prompt(run, prompt, threshold=threshold)
        return Outcome(result.to_json(), result.tables())

    def keep(self, run: "Run", document: Any) -> None:
        """Write nothing: the page writes `analysis/inspect.json`, for all sentences of the run."""
