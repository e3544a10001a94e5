"""The command `circuit` (Table 1), and the section `Attention` of the page."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from paramlens.analysis.analysis import Analysis, Section
from paramlens.display.figures import Figure, heatmap, pairs_figure, styled
from paramlens.display.outcome import Outcome
from paramlens.method.threshold import ACTIVE

if TYPE_CHECKING:
    from paramlens.runs.rundir import Run


class CircuitAnalysis(Analysis):
    name = "circuit"
    section = Section("attention", "Attention")

    def compute(self, run: "Run", *, threshold: float = ACTIVE, batches: int = 16, adversary: int = 20) -> Outcome:
        """Show which subcomponents are active where, and how faithful they are (Table 1).

        Args:
            run: Run directory.
            threshold: A subcomponent is active where its importance exceeds this, in [0, 1).
            batches: Number of batches to evaluate: held-out ones, if the run has them.
            adversary: Steps of gradient ascent to the worst masks; 320 tells after 20, 40, 80, 160 and 320. 0 leaves it out.
        """
        from paramlens.analysis.circuit import circuit

        result = circuit(run, threshold=threshold, batches=batches, adversary=adversary)
        return Outcome(result.to_json(), result.tables())

    def figures(self, document: Mapping[str, Any]) -> Iterator[Figure]:
        """Attention in one sequence, attention by role, and how far it moves; a figure without data is left out."""
        if document["example"]["attention"]:
            yield Figure("patterns", "Attention in one sequence: the target's, and the masked model's.", patterns_figure(document))
        if document["attention_by_role"]:
            caption = "Attention from a role (rows) to a role (columns): the target's, and the masked model's."
            yield Figure("roleattention", caption, role_attention_figure(document))
        if document["attention_kl"]:
            yield Figure("attention", "How far attention moves in the masked model: KL in nats by query.", attention_figure(document))


def attention_figure(circuit: Mapping[str, Any]) -> go.Figure:
    """KL in nats for every attention pattern (down) and role of the query (across)."""
    patterns = list(circuit["attention_kl"])
    roles = [*circuit["roles"], "all"] if "all" not in circuit["roles"] else circuit["roles"]
    z = [[circuit["attention_kl"][pattern][role] for role in roles] for pattern in patterns]
    texts = [[f"{value:.3f}" for value in row] for row in z]
    figure = go.Figure(heatmap(z, x=roles, y=patterns, texts=texts, hover="%{y}, query %{x}: %{z:.4f} nats"))
    figure.update_yaxes(autorange="reversed", automargin=True)
    return styled(figure, height=90 + 34 * len(patterns))


def patterns_figure(circuit: Mapping[str, Any]) -> go.Figure:
    """Attention in one sequence, the target beside the masked model, one row per pattern; keys across, queries down."""
    attention = circuit["example"]["attention"]
    positions = list(range(len(circuit["example"]["roles"])))
    return pairs_figure(attention, x=positions, y=positions, hover="query %{y}, key %{x}: %{z:.3f}", height=330)


def role_attention_figure(circuit: Mapping[str, Any]) -> go.Figure:
    """Attention from queries of a role (down) to all keys of a role (across), target beside masked model, one row per pattern."""
    roles = circuit["roles"]
    return pairs_figure(circuit["attention_by_role"], x=roles, y=roles, hover="from %{y} to %{x}: %{z:.4f}", height=220, texts=True)
