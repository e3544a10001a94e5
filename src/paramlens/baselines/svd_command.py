"""The command `svd` (greedy SVD pruning), and the section `Beside SVD` of the page. It loads torch only when it runs."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from paramlens.analysis.analysis import Analysis, Section
from paramlens.display.figures import NEUTRAL, Figure, styled
from paramlens.display.outcome import Outcome

if TYPE_CHECKING:
    from paramlens.runs.rundir import Run


class SvdAnalysis(Analysis):
    name = "svd"
    section = Section("baseline", "Beside SVD")

    def compute(self, run: "Run", *, tolerance: float | None = None, batches: int = 16, at_once: int = 1) -> Outcome:
        """Prune the target's weights greedily by SVD (Algorithm 2), and compare with the decomposition.

        Args:
            run: Run directory.
            tolerance: KL in nats at which the pruning stops. Defaults to the decomposition's own recon.
            batches: Number of batches to evaluate: held-out ones, if the run has them.
            at_once: Number of singular values removed at once: more is faster and less exact.
        """
        from paramlens.baselines.svd import svd_baseline

        result = svd_baseline(run, tolerance=tolerance, batches=batches, at_once=at_once)
        return Outcome(result.to_json(), result.tables())

    def figures(self, document: Mapping[str, Any]) -> Iterator[Figure]:
        caption = "KL by number of rank-1 matrices: SVD pruned greedily (Algorithm 2), and the decomposition (Figure 2)."
        yield Figure("svd", caption, svd_figure(document))


def svd_figure(svd: Mapping[str, Any]) -> go.Figure:
    """Figure 2 as curves: KL against rank for the pruned SVD, and against subcomponents for the decomposition at several thresholds."""
    figure = go.Figure()
    curve, ours = svd["curve"], svd["decomposition"]
    counts = {name: [sum(point[name].values()) for point in ours] for name in ("active", "unique")}
    for name, x, y, colour in (
        ("SVD, rank left", [point["total"] for point in curve], [point["kl"] for point in curve], 1),
        ("active at their role", counts["active"], [point["kl"] for point in ours], 0),
        ("unique, the active ones on", counts["unique"], [point["kl"] for point in ours], 2),
        ("unique, all on everywhere", counts["unique"], [point["kl_static"] for point in ours], NEUTRAL),
    ):
        points = {"size": 4 if name.startswith("SVD") else 7}
        y = [max(value, 1e-9) for value in y]
        figure.add_scatter(x=x, y=y, name=name, mode="lines+markers", line={"width": 1.5}, marker=points, meta=colour)
    figure.add_hline(y=svd["tolerance"], line={"color": "#9aa3af", "dash": "dot", "width": 1})
    figure.update_yaxes(type="log", exponentformat="power", title="KL, nats")
    figure.update_xaxes(title="rank-1 matrices, all sites")
    return styled(figure, height=380)
