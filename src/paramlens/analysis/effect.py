"""The effect of an edit on every fact, compared with control edits of equal rank at the same sites (Figures 3, 4)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paramlens.analysis.components import tokenizer_of
from paramlens.analysis.controls import CONTROLS, edit_slices
from paramlens.analysis.controls import controls as controls_of
from paramlens.analysis.edit import Edit, Selected, changed, find_fact, selected_table
from paramlens.analysis.held_out import data_of
from paramlens.display.result import Result
from paramlens.display.tables import Cell, Table, columns, figure, row, shaded
from paramlens.display.verdicts import Verdict, verdict_table
from paramlens.errors import ConfigError
from paramlens.kernels.machine import machine
from paramlens.method.sites import at_rest
from paramlens.runs.rundir import Run
from paramlens.tasks.facts.facts import Fact, kinds, recall, shipped_facts
from paramlens.tasks.language_models.encoding import encode, padded
from paramlens.tasks.language_models.limits import require_tokens

KINDS = ("target", "paraphrase", "other-target", "same-sport", "other-sport", "general", "reverse")


@dataclass(frozen=True)
class FactEffect:
    """An answer's probability before and after the edit, in [0, 1]; for several tokens, the product of theirs."""

    prompt: str
    answer: str
    kind: str
    before: float
    after: float
    right_before: bool
    """True if every token of the answer was the likeliest one before the edit."""
    right_after: bool


@dataclass(frozen=True)
class Effect:
    """What one edit leaves by kind of fact. kept, kept_mean: median and mean of after / before; right: share still likeliest.

    Counts only the facts that the model knew: their answer was the likeliest continuation before. None: it knew none of that kind.
    """

    kept: dict[str, float | None]
    kept_mean: dict[str, float | None]
    right: dict[str, float | None]
    perplexity: float | None
    """exp of the mean cross-entropy, in nats per token, of unrelated text. None: there is no such text."""


@dataclass(frozen=True, repr=False)
class Suppression(Result):
    """An edit, its effect on a set of facts, and controls at the same sites.

    The controls remove as many random slices, top singular slices of the weight, or other subcomponents of the run drawn at random; the
    last, W ← W - x̂ (x̂ᵀ W), removes what the weight writes for the tokens' activations, one slice for each of their directions.
    """

    run: str
    step: int
    method: str
    target: str
    selected: list[Selected]
    facts: list[FactEffect]
    effect: Effect
    perplexity_before: float | None
    controls: dict[str, Effect]
    controls_left_out: dict[str, str]
    """Control → why it cannot remove as much as the edit."""
    slices: dict[str, int]
    """Number of independent rank-1 slices that the "edit" and each control remove, summed over sites."""
    known: dict[str, tuple[int, int]]
    """Kind of fact → (number that the model knew before the edit, number of facts)."""
    verdicts: list[Verdict]
    """Whether the decomposition can be trusted."""
    warnings: list[str]
    """Reasons to trust the effect less."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        kept = ", ".join(f"{kind} {figure(value, 3)}" for kind, value in list(self.effect.kept.items())[:2])
        return f"{self.method} of {len(self.selected)} subcomponents from {self.run}, probability kept: {kept}"

    def tables(self) -> tuple[Table, ...]:
        """What was removed; the share of its probability that an answer keeps, by kind of fact, for edit and controls; verdicts."""
        effects = {"these parts": self.effect} | {name.replace("subcomponents", "parts"): each for name, each in self.controls.items()}
        kept = [
            (Cell(kind), Cell("{} of {}".format(*self.known[kind])), *(_kept_cell(effect.kept[kind]) for effect in effects.values()))
            for kind in self.effect.kept
        ]
        perplexities = row("perplexity", "", *(figure(effect.perplexity, 2) for effect in effects.values()))
        slices = row("slices taken out", "", *(str(number) for number in self.slices.values()), tone="faint")
        target = next(fact for fact in self.facts if fact.kind == "target")
        notes = [
            Cell(f"P({target.answer!r}) after {target.prompt!r}: {_probability(target.before)} before, {_probability(target.after)} after"),
            Cell("known: facts whose answer is the likeliest continuation before the edit; medians are of these"),
            Cell(f"perplexity before: {figure(self.perplexity_before, 2)}"),
            *(Cell(f"no control by {name}: {why}") for name, why in self.controls_left_out.items()),
            *(Cell(text, "warn") for text in self.warnings),
        ]
        table = Table(
            f"Probability kept, median by kind ({self.method}): {self.target}",
            columns("kind of fact", "known", *effects),
            (*kept, perplexities, slices),
            notes=tuple(notes),
        )
        return selected_table(self.selected), table, verdict_table(self.verdicts)


def _kept_cell(value: float | None) -> Cell:
    return Cell("-", "faint") if value is None else shaded(f"{value:.3f}", value, 1.0)


def _probability(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


@torch.no_grad()
def evaluate_edit(
    run: Run,
    edit: Edit,
    target: str,
    *,
    facts: Sequence[Fact] | None = None,
    texts: Sequence[str] | None = None,
    controls: Sequence[str] = CONTROLS,
) -> Suppression:
    """The effect of `edit` on every one of `facts`. target: sentence or prompt of the fact that the edit should remove.

    facts: Defaults to the shipped facts. texts: unrelated text for the perplexity; defaults to the sentences of the general facts.
    controls: names from `CONTROLS` to compare with; a control that cannot remove as much is left out.
    """
    facts = list(facts if facts is not None else shipped_facts())
    fact = find_fact(run, target, facts)
    named = list(kinds(facts if any(each.prompt == fact.prompt for each in facts) else [fact, *facts], fact, run.config.task.own_sentences))
    texts = [each.sentence for each, kind in named if kind == "general"] if texts is None else list(texts)
    model, tokenizer = data_of(run).model, tokenizer_of(run)

    def look() -> tuple[Tensor, Tensor, float | None]:
        right, probability = recall(model, tokenizer, [each for each, _ in named])
        return right, probability, perplexity(model, tokenizer, texts) if texts else None

    def effect(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Effect]:
        with changed(model, weights):
            right, probability, after = look()
        return right, probability, _effect(named, before, known, probability, right, after)

    with at_rest(model), machine(run.config):
        known, before, perplexity_before = look()
        right, after, own = effect(edit.weights)
        others = controls_of(run, edit, fact, controls) if controls else {}
        compared = {name: _mean([effect(weights)[2] for weights in each.draws]) for name, each in others.items() if each.draws}
    rows = zip(named, before.tolist(), after.tolist(), known.tolist(), right.tolist(), strict=True)
    found = [FactEffect(each.prompt, each.answer, kind, *numbers) for (each, kind), *numbers in rows]
    return Suppression(
        run=str(run.path),
        step=run.step,
        method=edit.method,
        target=fact.sentence,
        selected=list(edit.selected),
        facts=found,
        effect=own,
        perplexity_before=perplexity_before,
        controls=compared,
        controls_left_out={name: each.why_not for name, each in others.items() if each.why_not},
        slices={"edit": edit_slices(run, edit)} | {name: others[name].slices for name in compared},
        known=_known(found),
        verdicts=list(run.verdicts),
        warnings=[*edit.warnings, *_unknown(found)],
    )


def _known(facts: Sequence[FactEffect]) -> dict[str, tuple[int, int]]:
    by_kind = {kind: [fact.right_before for fact in facts if fact.kind == kind] for kind in KINDS}
    return {kind: (sum(right), len(right)) for kind, right in by_kind.items() if right}


def _unknown(facts: Sequence[FactEffect]) -> Iterator[str]:
    """A warning if the model does not know the fact to remove, and one if it knows no other fact."""
    for fact in facts:
        if fact.kind == "target" and not fact.right_before:
            probability = _probability(fact.before)
            yield f"the model does not know the target: P({fact.answer!r}) is {probability} before the edit, and another token is likelier"
    others = [fact.right_before for fact in facts if fact.kind != "target"]
    if others and not any(others):
        yield f"the model knows none of the {len(others)} other facts, so nothing shows what else the edit does"


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: object, texts: Sequence[str], *, batch: int = 32) -> float:
    """Exp of the mean cross-entropy per token, over all tokens but the first of each text.

    Raises `ConfigError` if no text has two tokens, and `BatchError` for a text that is longer than the model takes.
    """
    sequences = [ids for text in texts if len(ids := encode(tokenizer, text)) > 1]
    require_tokens(model, sequences, ["text"] * len(sequences))
    if not sequences:
        raise ConfigError("perplexity: no text of two tokens or more")
    lost, count = 0.0, 0
    device = next(model.parameters()).device
    for start in range(0, len(sequences), batch):
        part = padded(tokenizer, sequences[start : start + batch]).to(device)
        assert isinstance(part.inputs, dict)
        ids = part.inputs["input_ids"]
        expected = ids[:, 1:] if part.present is None else ids[:, 1:].masked_fill(~part.present[:, 1:], -100)
        logits = model(**part.inputs).logits[:, :-1]
        lost += F.cross_entropy(logits.flatten(0, 1).double(), expected.flatten(), ignore_index=-100, reduction="sum").item()
        count += int((expected != -100).sum())
    return float(torch.tensor(lost / count).exp())


def _effect(
    named: Sequence[tuple[Fact, str]], before: Tensor, known: Tensor, after: Tensor, right: Tensor, perplexity: float | None
) -> Effect:
    """The effect on the facts that the model knew before."""
    kept: dict[str, list[float]] = {kind: [] for kind in KINDS if any(kind == each for _, each in named)}
    still: dict[str, list[bool]] = {kind: [] for kind in kept}
    for (_, kind), was, counts, now, correct in zip(named, before.tolist(), known.tolist(), after.tolist(), right.tolist(), strict=True):
        if counts:
            kept[kind].append(now / was)
            still[kind].append(correct)
    return Effect(
        kept={kind: median(values) if values else None for kind, values in kept.items()},
        kept_mean={kind: mean(values) if values else None for kind, values in kept.items()},
        right={kind: sum(values) / len(values) if values else None for kind, values in still.items()},
        perplexity=perplexity,
    )


def _mean(effects: Sequence[Effect]) -> Effect:
    def over(name: str) -> dict[str, float | None]:
        first: dict[str, float | None] = getattr(effects[0], name)
        return {kind: None if value is None else mean(getattr(effect, name)[kind] for effect in effects) for kind, value in first.items()}

    known = [effect.perplexity for effect in effects if effect.perplexity is not None]
    return Effect(over("kept"), over("kept_mean"), over("right"), mean(known) if known else None)
