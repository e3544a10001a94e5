"""The command `suppress`, which removes subcomponents, and the section `Edits` of the page."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import plotly.graph_objects as go

from paramlens.analysis.analysis import Analysis, Section
from paramlens.display.figures import Figure, styled
from paramlens.display.outcome import Outcome
from paramlens.display.streams import ErrorConsole
from paramlens.display.verdicts import verdict_table
from paramlens.errors import ConfigError
from paramlens.method.threshold import ACTIVE

if TYPE_CHECKING:
    from paramlens.runs.rundir import Run

_TEMPLATE = """
{% macro row(name, effect) %}
<tr><td>{{ name }}</td>
{%- for value in effect.kept.values() %}<td>{{ "–" if value is none else "%.3f" | format(value) }}</td>{% endfor %}
<td>{{ "–" if effect.perplexity is none else "%.2f" | format(effect.perplexity) }}</td></tr>
{% endmacro %}
{% for edit in document.edits %}
<h3>Suppressed for “{{ edit.target }}”</h3>
<p>{{ edit.selected | length }} subcomponents by {{ edit.method }}:
   {% for each in edit.selected[:12] %}{{ each.site }} {{ each.subcomponent }}
   {%- if each.token %} at “{{ each.token.strip() }}”{% endif %}{{ ", " if not loop.last }}{% endfor %}
   {%- if edit.selected | length > 12 %} and {{ edit.selected | length - 12 }} more{% endif %}.
   Share of its probability that an answer keeps, median by kind of fact
   {%- if edit.known is defined %}, of those that the model knew before{% endif %}; controls are as many slices at the same sites.</p>
{% for text in (edit.warnings if edit.warnings is defined else []) %}
<p class="warning">{{ text }}</p>
{% endfor %}
<div class="scroll" tabindex="0" role="region" aria-label="effect by kind of fact"><table class="suppression-table">
<thead><tr><th>edit</th>{% for kind in edit.effect.kept %}<th>{{ kind }}
{%- if edit.known is defined %} ({{ edit.known[kind][0] }} of {{ edit.known[kind][1] }}){% endif %}</th>{% endfor %}
<th>perplexity</th></tr></thead>
<tbody>
{{ row("subcomponents", edit.effect) }}
{%- for name, effect in edit.controls.items() %}{{ row(name, effect) }}{% endfor %}
</tbody></table></div>
<details><summary>every fact</summary><div class="scroll"><table>
<thead><tr><th>prompt</th><th>answer</th><th>kind</th><th>before</th><th>after</th></tr></thead>
<tbody>
{% for fact in edit.facts %}
<tr><td>{{ fact.prompt }}</td><td>{{ fact.answer }}</td><td>{{ fact.kind }}</td>
<td>{{ "%.3f" | format(fact.before) }}</td><td>{{ "%.3f" | format(fact.after) }}</td></tr>
{% endfor %}
</tbody></table></div></details>
{% endfor %}
"""


class SuppressAnalysis(Analysis):
    name = "suppress"
    section = Section("edits", "Edits", _TEMPLATE)

    def compute(
        self,
        run: "Run",
        *,
        unique_to: str | None = None,
        top: int | None = None,
        tokens: str | None = None,
        per_token: int | None = None,
        sites: tuple[str, ...] | None = None,
        site: str | None = None,
        subcomponent: tuple[int, ...] = (),
        fact: str | None = None,
        method: Literal["projection", "subtraction"] = "projection",
        evaluate: str = "shipped",
        text: Path | None = None,
        skip_controls: bool = False,
        threshold: float = ACTIVE,
        save: Path | None = None,
    ) -> Outcome:
        """Remove subcomponents from the target, and show the effect on every fact.

        Args:
            run: Run directory.
            unique_to: Sentence or prompt; removes subcomponents active in it and in no other sentence of the run.
            top: Remove at most this many, the highest importance × contribution first. Defaults to all.
            tokens: Words of the sentence; removes only subcomponents active at these words.
            per_token: Remove at most this many at each token.
            sites: Patterns of the sites to edit. Defaults to all.
            site: Site of the subcomponents given by --subcomponent.
            subcomponent: Numbers of the subcomponents to remove.
            fact: With --subcomponent: sentence whose effect is measured. Defaults to the run's first sentence.
            method: Projection (§5.2), or subtraction of the subcomponents themselves.
            evaluate: Facts to evaluate: a YAML or JSON file, shipped, or none.
            text: Text file for the perplexity, one text per line. Defaults to the general facts.
            skip_controls: Do not compare with control edits.
            threshold: A subcomponent is active where its importance exceeds this, in [0, 1).
            save: New folder for the edited model, in the Hugging Face format.
        """
        from paramlens.analysis.controls import CONTROLS
        from paramlens.analysis.edit import suppress
        from paramlens.analysis.effect import evaluate_edit
        from paramlens.tasks.facts.facts import read_facts, shipped_facts
        from paramlens.tasks.reading import read_lines

        if (site is None) != (not subcomponent):
            raise ConfigError("suppress: give --site and --subcomponent together, or neither")
        facts = shipped_facts() if evaluate in ("shipped", "none") else read_facts(Path(evaluate))
        which = {"unique_to": unique_to, "top": top, "tokens": tokens, "per_token": per_token, "sites": sites}
        by_hand = [(site, c) for c in subcomponent if site is not None] or None
        edit = suppress(run, **which, subcomponents=by_hand, method=method, threshold=threshold, facts=facts)
        stderr = ErrorConsole()
        for warning in edit.warnings:
            stderr.print(f"paramlens: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        target = unique_to or fact or next(iter(run.config.task.own_sentences), None)
        if evaluate == "none":
            selected, verdicts = ([dataclasses.asdict(each) for each in found] for found in (edit.selected, run.verdicts))
            document: dict[str, Any] = {"selected": selected, "verdicts": verdicts, "warnings": list(edit.warnings)}
            tables = (*edit.tables(), verdict_table(run.verdicts))
        elif target is None:
            raise ConfigError("suppress: give --fact, the sentence that the effect is judged by")
        else:
            texts = read_lines(text, f"text {text}") if text else None
            result = evaluate_edit(run, edit, target, facts=facts, texts=texts, controls=() if skip_controls else CONTROLS)
            document, tables = result.to_json(), result.tables()
        if save is not None:
            document["saved"] = str(edit.save(save))
            stderr.print(f"saved: {save}", highlight=False, markup=False, soft_wrap=True)
        return Outcome(document, tables)

    def keep(self, run: "Run", document: Mapping[str, Any]) -> None:
        """Add an edit to `analysis/suppress.json` if it was evaluated."""
        if "facts" in document:
            kept = {key: value for key, value in document.items() if key != "saved"}
            run.keep_analysis(self.name, "edits", kept, same=("target", "method", "selected"))

    def figures(self, document: Mapping[str, Any]) -> Iterator[Figure]:
        for i, edit in enumerate(document["edits"]):
            taken = f"{len(edit['selected'])} subcomponents removed for “{edit['target']}” ({edit['method']})"
            yield Figure(f"suppress-{i}", f"{taken}: what every kind of fact keeps (Figures 3, 4).", suppression_figure(edit))


def suppression_figure(edit: Mapping[str, Any]) -> go.Figure:
    """Figures 3 and 4 as bars: the share of its probability that an answer keeps, by kind of fact, for the edit and its controls."""
    figure = go.Figure()
    effects = {f"{len(edit['selected'])} subcomponents": edit["effect"], **edit["controls"]}
    for colour, (name, effect) in enumerate(effects.items()):
        kept = effect["kept"]
        hover = "%{x}, " + name + ": %{y:.3f}<extra></extra>"
        figure.add_bar(x=list(kept), y=list(kept.values()), name=name, meta=colour, hovertemplate=hover)
    figure.add_hline(y=1, line={"color": "#9aa3af", "dash": "dot", "width": 1})
    figure.update_yaxes(title="share kept, median", rangemode="tozero")
    return styled(figure, height=340)
