"""The command `agreement`, and the section `Agreement of seeds` of the page."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from paramlens.analysis.analysis import Analysis, Section
from paramlens.display.figures import Figure, styled
from paramlens.display.outcome import Outcome
from paramlens.method.threshold import ACTIVE

if TYPE_CHECKING:
    from paramlens.runs.rundir import Run


class AgreementAnalysis(Analysis):
    name = "agreement"
    section = Section("seeds", "Agreement of seeds")

    def compute(self, *runs: "Run", threshold: float = ACTIVE, batches: int = 16) -> Outcome:
        """Show how far runs of one target agree: subcomponents are matched by direction and by where they are active.

        Args:
            runs: Run directories, two or more.
            threshold: A subcomponent counts if its importance exceeds this at one token at least.
            batches: Number of batches of the first run to evaluate: held-out ones, if it has them.
        """
        from paramlens.analysis.agreement import agreement

        result = agreement(runs, threshold=threshold, batches=batches)
        return Outcome(result.to_json(), result.tables())

    def figures(self, document: Mapping[str, Any]) -> Iterator[Figure]:
        caption = f"How far {len(document['runs'])} runs of the same target agree, in [0, 1]; by chance: against a random rotation."
        yield Figure("agreement", caption, agreement_figure(document))


def agreement_figure(agreement: Mapping[str, Any]) -> go.Figure:
    """How far runs of different seeds agree at each site, in [0, 1]: overall, by direction, by pattern, and by chance."""
    sites, figure = agreement["sites"], go.Figure()
    names = {"agreement": "agreement", "direction": "direction", "pattern": "pattern", "chance": "by chance"}
    for colour, (key, name) in enumerate(names.items()):
        figure.add_bar(x=list(sites), y=[site[key] for site in sites.values()], name=name, meta=colour)
    figure.update_yaxes(range=[0, 1])
    return styled(figure, height=340)
