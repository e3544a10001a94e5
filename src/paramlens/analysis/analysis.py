"""What an analysis is to the command line and to the page: its command with options, its JSON, its tables, its section."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from paramlens.display.outcome import Outcome

if TYPE_CHECKING:
    from paramlens.display.figures import Figure
    from paramlens.runs.rundir import Run


@dataclass(frozen=True)
class Section:
    """A section of the page: its anchor and its heading. template: HTML above its figures, in Jinja2, of the analysis's `document`."""

    id: str
    title: str
    template: str = ""


class Analysis:
    """One analysis of runs. A subclass, with one line of `paramlens.registry`, is a command and, with a `section`, a part of the page.

    `name` is the command's, and that of the file `analysis/<name>.json`. The module of a subclass needs no torch until `compute` is called.
    """

    name: ClassVar[str]
    section: ClassVar[Section | None] = None

    def compute(self, *given: Any, **options: Any) -> Outcome:
        """What the command does.

        The first parameter is `run`, an opened run, or `*runs`, or `model`, a run or the name of a language model. Those after it are the
        command's options, by name: their annotations parse them, the docstring's `Args:` explains them in `--help`.
        """
        raise NotImplementedError

    def keep(self, run: "Run", document: Mapping[str, Any]) -> None:
        """Write the document to the run directory, with the step of the checkpoint it describes."""
        run.save_analysis(self.name, document if "step" in document else {"step": run.step, **document})

    def figures(self, document: Mapping[str, Any]) -> "Iterable[Figure]":  # noqa: ARG002
        """The figures of the section, from a document that `keep` wrote; no torch."""
        return ()

    def kept(self, *given: Any, **options: Any) -> Outcome:
        """What `compute` finds, after it was written to the directory of every run that was given."""
        outcome = self.compute(*given, **options)
        for run in given:
            if not isinstance(run, str):
                self.keep(run, outcome.document)
        return outcome
