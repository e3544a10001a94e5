"""The interface of an analysis to the command line and the page: its command with options, its JSON, its tables, its section."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from paramlens.display.outcome import Outcome

if TYPE_CHECKING:
    from paramlens.display.figures import Figure
    from paramlens.runs.rundir import Run


@dataclass(frozen=True)
class Section:
    """A section of the page: its anchor and its heading. template: Jinja2 HTML above the figures; it reads the analysis's `document`."""

    id: str
    title: str
    template: str = ""


class Analysis:
    """One analysis of runs. A subclass listed in `paramlens.registry` becomes a command and, with a `section`, appears on the page.

    `name` names the command and the file `analysis/<name>.json`. The module of a subclass loads no torch before `compute` is called.
    """

    name: ClassVar[str]
    section: ClassVar[Section | None] = None

    def compute(self, *given: Any, **options: Any) -> Outcome:
        """Compute the analysis: this is what the command does.

        The first parameter is `run` (an opened run), `*runs`, or `model` (a run or the name of a language model). The keyword parameters
        are the command's options: their annotations parse them, and the docstring's `Args:` is their text in `--help`.
        """
        raise NotImplementedError

    def keep(self, run: "Run", document: Mapping[str, Any]) -> None:
        """Write the document to the run directory, with the step of its checkpoint."""
        run.save_analysis(self.name, document if "step" in document else {"step": run.step, **document})

    def figures(self, document: Mapping[str, Any]) -> "Iterable[Figure]":  # noqa: ARG002
        """The figures of the section, from a document that `keep` wrote. Must not load torch."""
        return ()

    def compute_and_keep(self, *given: Any, **options: Any) -> Outcome:
        """Call `compute`, write its document to the directory of every given run, and return the outcome."""
        outcome = self.compute(*given, **options)
        for run in given:
            if not isinstance(run, str):
                self.keep(run, outcome.document)
        return outcome
