"""The command `trace` (causal tracing), and the section `Tracing` of the page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from paramlens.analysis.analysis import Analysis, Section
from paramlens.display.figures import Figure, heatmap, styled
from paramlens.display.outcome import Outcome

if TYPE_CHECKING:
    from paramlens.runs.rundir import Run


class TraceAnalysis(Analysis):
    name = "trace"
    section = Section("tracing", "Tracing")

    def compute(
        self,
        model: "Run | str",
        *,
        prompt: str,
        subject: str,
        answer: str | None = None,
        noise: float = 3.0,
        samples: int = 10,
        window: int = 3,
        seed: int = 0,
        zero_mlp: bool = False,
    ) -> Outcome:
        """Show where in a causal language model restored states bring the answer to a prompt back (causal tracing).

        Args:
            model: Run directory, local folder, or id on the Hugging Face Hub.
            prompt: The prompt, up to the answer.
            subject: Words of the prompt to corrupt.
            answer: The answer. Defaults to the model's likeliest next token.
            noise: Noise on the subject's embeddings, in standard deviations of all embeddings.
            samples: Number of draws of the noise.
            window: Number of neighbouring blocks whose MLPs or attentions are restored together.
            seed: Seed of the noise.
            zero_mlp: Also show the sweep that sets one whole MLP to zero.
        """
        from paramlens.analysis.components import tokenizer_of
        from paramlens.analysis.trace import trace
        from paramlens.tasks.language_models.loading import load_language

        if isinstance(model, str):
            language = load_language(f"{model}/target" if Path(model, "target/config.json").is_file() else model)
            name, network, tokenizer = model, language.model, language.tokenizer
        else:
            name, network, tokenizer = str(model.path), model.decomposition.model, tokenizer_of(model)
        how = {"answer": answer, "noise": noise, "samples": samples, "window": window, "seed": seed}
        result = trace(network, tokenizer, prompt, subject, name=name, **how)
        return Outcome(result.to_json(), result.tables(zero_mlp=zero_mlp))

    def keep(self, run: "Run", document: Mapping[str, Any]) -> None:
        run.keep_analysis(self.name, "traces", document, same=("prompt", "subject", "answer"))

    def figures(self, document: Mapping[str, Any]) -> Iterator[Figure]:
        for i, each in enumerate(document["traces"]):
            text = f"{each['prompt']} {each['answer']}"
            caption = f"Causal tracing of “{text}”: where restoring a state brings the answer back (Figures 7, 8)."
            yield Figure(f"trace-{i}", caption, trace_figure(each))
        if document["traces"]:
            yield Figure("zero", "One whole MLP set to zero (Figure 9).", zero_figure(document["traces"]))


def trace_figure(trace: Mapping[str, Any]) -> go.Figure:
    """Figures 7 and 8: the answer's probability with one state restored, by block (across) and token (down); hidden, MLP, attention."""
    kinds = ("hidden", "mlp", "attention")
    figure = make_subplots(1, 3, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=["hidden state", "MLP", "attention"])
    marked = trace["subject_positions"]
    labels = [f"{i} {token.strip()}{'*' if i in marked else ''}" for i, token in enumerate(trace["positions"])]
    highest = max(trace["clean"], *(value for kind in kinds for row in trace[kind] for value in row))
    for column, kind in enumerate(kinds, 1):
        z = [list(values) for values in zip(*trace[kind], strict=True)]
        blocks = list(range(len(trace[kind])))
        cells = heatmap(z, x=blocks, y=labels, hover="block %{x}, %{y}: %{z:.3f}", highest=highest, scale=column == 3)
        figure.add_trace(cells, row=1, col=column)
    figure.update_xaxes(title="block", dtick=1)
    figure.update_yaxes(autorange="reversed")
    return styled(figure, height=150 + 26 * len(labels), top=30)


def zero_figure(traces: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Figure 9: the answer's probability with one whole MLP set to zero; dashed: with all MLPs."""
    figure = go.Figure()
    for colour, trace in enumerate(traces):
        blocks, name = list(range(len(trace["zero_mlp"]))), f"{trace['prompt']} {trace['answer']}"
        figure.add_bar(x=blocks, y=trace["zero_mlp"], name=name, meta=colour)
        figure.add_scatter(
            x=blocks, y=[trace["clean"]] * len(blocks), name=f"{name}, whole", mode="lines", line={"dash": "dash", "width": 1}, meta=colour
        )
    figure.update_xaxes(title="block whose MLP is zero", dtick=1)
    figure.update_yaxes(title="probability of the answer", rangemode="tozero")
    return styled(figure, height=320)
