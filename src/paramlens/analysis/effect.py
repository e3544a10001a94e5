"""What an edit does to every fact, beside edits of equal rank at the same sites that know nothing of the decomposition (Figures 3, 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paramlens.analysis.components import own_sentences, run_sentences, tokenizer_of
from paramlens.analysis.edit import Edit, Selected, changed, find_fact, selected_table, taken_out, without_largest, without_random
from paramlens.analysis.held_out import data_of
from paramlens.errors import ConfigError
from paramlens.machine import machine
from paramlens.rundir import Run
from paramlens.shown import Shown
from paramlens.sites import at_rest
from paramlens.tables import Cell, Table, columns, figure, row, shaded
from paramlens.tasks import generator
from paramlens.tasks.facts import Fact, kinds, recall, shipped_facts
from paramlens.tasks.language import encode, padded
from paramlens.tasks.limits import require_tokens

DRAWS = 5
"""Draws of a control that is random; its figures are their means."""

CONTROLS = ("random directions", "top singular directions", "random subcomponents", "activation read")

KINDS = ("target", "paraphrase", "other-target", "same-sport", "other-sport", "general", "reverse")


@dataclass(frozen=True)
class FactEffect:
    """An answer's probability before and after, in [0, 1]; of several tokens, their product."""

    prompt: str
    answer: str
    kind: str
    before: float
    after: float
    right_before: bool
    """Whether the answer was the likeliest continuation, token by token."""
    right_after: bool


@dataclass(frozen=True)
class Effect:
    """What one edit leaves: by kind of fact, after / before. kept: its median; kept_mean: its mean; right: share still the likeliest."""

    kept: dict[str, float]
    kept_mean: dict[str, float]
    right: dict[str, float]
    perplexity: float | None
    """exp of the mean cross-entropy in nats per token of unrelated text; none where there is none."""


@dataclass(frozen=True, repr=False)
class Suppression(Shown):
    """An edit, its effect on a fact set, and controls of equal rank at the same sites.

    controls: random directions; the weight's top singular directions; as many of the run's other subcomponents, drawn at random;
    and the plain edit that reads the tokens' activations: at the same sites and tokens W ← W - x̂ (x̂ᵀ W).
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

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        kept = ", ".join(f"{kind} {value:.3f}" for kind, value in list(self.effect.kept.items())[:2])
        return f"{self.method} of {len(self.selected)} subcomponents from {self.run}, probability kept: {kept}"

    def tables(self) -> tuple[Table, ...]:
        """What was taken out, and by kind of fact the share of its probability that an answer keeps, beside the controls."""
        effects = {"these parts": self.effect} | {name.replace("subcomponents", "parts"): each for name, each in self.controls.items()}
        kept = [
            (Cell(kind), *(shaded(f"{effect.kept[kind]:.3f}", effect.kept[kind], 1.0) for effect in effects.values()))
            for kind in self.effect.kept
        ]
        perplexities = row("perplexity", *(figure(effect.perplexity, 2) for effect in effects.values()))
        table = Table(
            f"Probability kept, median by kind ({self.method}): {self.target}",
            columns("kind of fact", *effects),
            (*kept, perplexities),
            notes=(Cell(f"perplexity before: {figure(self.perplexity_before, 2)}"),),
        )
        return selected_table(self.selected), table


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
    """The effect of `edit` on every one of `facts`, of which `target` (a sentence or prompt) is the one that was to go.

    facts: none: the shipped ones. controls: those of `CONTROLS` to compare with.
    texts: unrelated text for the perplexity; none: the sentences of the general facts.
    """
    facts = list(facts if facts is not None else shipped_facts())
    fact = find_fact(run, target, facts)
    named = list(kinds(facts if any(each.prompt == fact.prompt for each in facts) else [fact, *facts], fact, own_sentences(run)))
    texts = [each.sentence for each, kind in named if kind == "general"] if texts is None else list(texts)
    model, tokenizer = data_of(run).model, tokenizer_of(run)

    def look() -> tuple[Tensor, Tensor, float | None]:
        right, probability = recall(model, tokenizer, [each for each, _ in named])
        return right, probability, perplexity(model, tokenizer, texts) if texts else None

    def effect(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Effect]:
        with changed(model, weights):
            right, probability, after = look()
        return right, probability, _effect(named, before, probability, right, after)

    with at_rest(model), machine(run.config):
        right_before, before, perplexity_before = look()
        right, after, own = effect(edit.weights)
        others = _controls(run, edit, fact) if controls else {}
        compared = {name: _mean([effect(weights)[2] for weights in others[name]]) for name in controls}
    rows = zip(named, before.tolist(), after.tolist(), right_before.tolist(), right.tolist(), strict=True)
    return Suppression(
        run=str(run.path),
        step=run.step,
        method=edit.method,
        target=fact.sentence,
        selected=list(edit.selected),
        facts=[FactEffect(each.prompt, each.answer, kind, *numbers) for (each, kind), *numbers in rows],
        effect=own,
        perplexity_before=perplexity_before,
        controls=compared,
    )


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: object, texts: Sequence[str], *, batch: int = 32) -> float:
    """Exp of the mean cross-entropy per token over all tokens of all texts but the first of each.

    Raises `ConfigError` if no text has two tokens, and `BatchError` for one that has more than the model takes.
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


def _effect(named: Sequence[tuple[Fact, str]], before: Tensor, after: Tensor, right: Tensor, perplexity: float | None) -> Effect:
    ratio, kept = (after / before.clamp(min=1e-12)).tolist(), dict[str, list[float]]()
    still: dict[str, list[bool]] = {}
    for (_, kind), value, correct in zip(named, ratio, right.tolist(), strict=True):
        kept.setdefault(kind, []).append(value)
        still.setdefault(kind, []).append(correct)
    present = [kind for kind in KINDS if kind in kept]
    return Effect(
        kept={kind: median(kept[kind]) for kind in present},
        kept_mean={kind: mean(kept[kind]) for kind in present},
        right={kind: sum(still[kind]) / len(still[kind]) for kind in present},
        perplexity=perplexity,
    )


def _mean(effects: Sequence[Effect]) -> Effect:
    def over(name: str) -> dict[str, float]:
        return {kind: mean(getattr(effect, name)[kind] for effect in effects) for kind in effects[0].kept}

    known = [effect.perplexity for effect in effects if effect.perplexity is not None]
    return Effect(over("kept"), over("kept_mean"), over("right"), mean(known) if known else None)


def _controls(run: Run, edit: Edit, fact: Fact) -> dict[str, list[dict[str, Tensor]]]:
    """Control → its draws, each new weights for the edited sites: as many slices as the edit takes there."""
    seen = run_sentences(run, [fact.sentence])
    made: dict[str, list[dict[str, Tensor]]] = {name: [{} for _ in range(DRAWS if "random" in name else 1)] for name in CONTROLS}
    for site in run.decomposition.sites:
        chosen = [each for each in edit.selected if each.site == site.name]
        if not chosen:
            continue
        W, U, V, r = site.W, run.decomposition.U[site.name], run.decomposition.V[site.name], len(chosen)
        rest = [c for c in range(run.decomposition.C) if c not in {each.subcomponent for each in chosen}]
        for draw in range(DRAWS):
            rng = generator("control", site.name, draw)
            made["random directions"][draw][site.name] = without_random(W, r, generator=rng)
            drawn = [rest[i] for i in torch.randperm(len(rest), generator=rng)[:r].tolist()]
            made["random subcomponents"][draw][site.name] = taken_out(W, U[:, drawn], V[drawn], edit.method)
        made["top singular directions"][0][site.name] = without_largest(W, r)
        made["activation read"][0][site.name] = without_activations(W, _activations(seen.inputs[site.name][0], chosen))
    return made


def _activations(x: Tensor, chosen: Sequence[Selected]) -> Tensor:
    """The site's inputs at the tokens where the chosen subcomponents stand; of those named by hand, at all tokens."""
    places = sorted({each.position for each in chosen if each.position is not None}) or range(len(x))
    return x[list(places)]


def without_activations(W: Tensor, x: Tensor) -> Tensor:
    """W ← W - X̂ᵀ X̂ W: the plain edit that reads the given activations (rows of x) and takes out all that the weight writes for them."""
    basis = torch.linalg.qr(x.double().T).Q
    return (W.double() - basis @ (basis.T @ W.double())).to(W.dtype)
