"""Edits of the target's weights: choose subcomponents, remove them, and restore the weights (§5.2).

projection   W ← W - Σ_k a_k û_k v̂_kᵀ, orthogonal to every û_k v̂_kᵀ; a_k = û_kᵀ W v̂_k where these are orthogonal to each other (§5.2)
subtraction  W ← W - Σ_k u_k v_kᵀ, the subcomponents themselves, as a mask of 0 removes them
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paramlens.analysis.components import active_in, require_subcomponent, run_sentences, tokenizer_of
from paramlens.analysis.held_out import data_of
from paramlens.display.result import Result
from paramlens.display.tables import Cell, Column, Table, figure, row, site_cell, token_text
from paramlens.display.verdicts import failures
from paramlens.errors import ConfigError
from paramlens.kernels.machine import machine
from paramlens.method.sites import Product, Site, TargetRows, at_rest, find_sites, named_sites, replaced
from paramlens.method.threshold import ACTIVE, require_threshold
from paramlens.runs.rundir import Run
from paramlens.tasks.facts.facts import Fact, fact_of, shipped_facts
from paramlens.tasks.language_models.encoding import encode_fact
from paramlens.tasks.language_models.loading import save_language
from paramlens.tasks.language_models.tokens import positions_of, token_texts

Method = Literal["projection", "subtraction"]


@dataclass(frozen=True)
class Selected:
    """A subcomponent chosen for an edit, and the token where its score is highest. None in a field: it was named by hand."""

    site: str
    subcomponent: int
    position: int | None = None
    token: str | None = None
    importance: float | None = None
    """g at that token."""
    contribution: float | None = None
    """What it adds at that token to the answer's log-probability, in nats, to first order: (x · u) v · ∂ log p / ∂y."""


@dataclass(frozen=True, repr=False)
class Edit(Result):
    """New weights for some sites of a model. Nothing is changed until it is applied."""

    model: nn.Module
    tokenizer: Any
    selected: tuple[Selected, ...]
    method: Method
    weights: Mapping[str, Float[Tensor, "d_in d_out"]]
    warnings: tuple[str, ...] = ()
    """Reasons not to trust the edit: the verdicts that its decomposition fails."""

    def summary(self) -> str:
        return f"{self.method} of {len(self.selected)} subcomponents at {len(self.weights)} sites"

    def tables(self) -> tuple[Table, ...]:
        """The subcomponents that the edit removes, and the warnings."""
        table = selected_table(self.selected)
        return (replace(table, notes=(*table.notes, *(Cell(text, "warn") for text in self.warnings))),)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Give the model itself the new weights while the context is active, then restore its own, bit for bit."""
        with changed(self.model, self.weights):
            yield self.model

    def copy(self) -> nn.Module:
        """A copy of the model with the new weights."""
        with self.applied():
            return copy.deepcopy(self.model)

    def save(self, path: str | Path) -> Path:
        """Write the edited model as a plain Hugging Face folder.

        Raises `ConfigError` if `path` exists and is not an empty folder, if the model is not from transformers, or if transformers does
        not read back exactly this model; in the last case nothing is left in the folder.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"save {path}: exists; give a new folder")
        from transformers import PreTrainedModel

        if not isinstance(self.model, PreTrainedModel):  # a PEFT model would save only its adapter, without the edit
            raise ConfigError(f"save {path}: {type(self.model).__name__} is no transformers model; use Edit.copy() and save it yourself")
        with self.applied():
            save_language(self.model, self.tokenizer, path)
        return path


LISTED = 12
"""Maximum number of subcomponents that a table lists one by one."""


def selected_table(selected: Sequence[Selected]) -> Table:
    """The subcomponents that an edit removes, one row for each of the first `LISTED`."""
    heads = (Column("site", right=False), Column("subcomponent"), Column("token", right=False), Column("importance"), Column("adds, nats"))
    rows = tuple(
        (
            site_cell(each.site),
            *row(str(each.subcomponent), token_text(each.token or "-"), figure(each.importance, 3), figure(each.contribution, 3)),
        )
        for each in selected[:LISTED]
    )
    more = (Cell(f"and {len(selected) - LISTED} more"),) if len(selected) > LISTED else ()
    return Table(f"{len(selected)} subcomponents removed", heads, rows, notes=more)


@contextmanager
def changed(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the sites named in `weights` these weights while active. Their own are always restored, bit for bit, also after an error."""
    sites = named_sites(model, list(weights)) if weights else ()
    before = [site.W.clone() for site in sites]
    try:
        for site in sites:
            site.write(weights[site.name])
        yield
    finally:
        for site, W in zip(sites, before, strict=True):
            site.write(W)


def project_out(
    W: Float[Tensor, "d_in d_out"], reads: Float[Tensor, "d_in r"], writes: Float[Tensor, "r d_out"]
) -> Float[Tensor, "d_in d_out"]:
    """Project W onto the matrices orthogonal to all r slices û_k v̂_kᵀ (§5.2).

    For slices orthogonal to each other, and so for a single one, this is W - Σ_k (û_kᵀ W v̂_k) û_k v̂_kᵀ. A second application changes
    nothing.
    """
    u = reads.double() / reads.double().norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    v = writes.double() / writes.double().norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    gram = (u.T @ u) * (v @ v.T)
    along = torch.einsum("ik,ij,kj->k", u, W.double(), v)
    share = torch.linalg.pinv(gram, hermitian=True) @ along
    return (W.double() - (u * share) @ v).to(W.dtype)


def without_random(W: Float[Tensor, "d_in d_out"], count: int, *, generator: torch.Generator) -> Float[Tensor, "d_in d_out"]:
    """A control: project `count` slices of random directions out of W."""
    sizes = ((W.shape[0], count), (count, W.shape[1]))
    reads, writes = (torch.randn(size, generator=generator, dtype=torch.float64).to(W) for size in sizes)
    return project_out(W, reads, writes)


def without_largest(W: Float[Tensor, "d_in d_out"], count: int) -> Float[Tensor, "d_in d_out"]:
    """A control: remove the `count` largest singular slices of W."""
    left, _, right = torch.linalg.svd(W.double(), full_matrices=False)
    return project_out(W, left[:, :count], right[:count])


def taken_out(
    W: Float[Tensor, "d_in d_out"], reads: Float[Tensor, "d_in r"], writes: Float[Tensor, "r d_out"], method: Method
) -> Float[Tensor, "d_in d_out"]:
    """W without r slices, removed by `method`."""
    return project_out(W, reads, writes) if method == "projection" else W - reads @ writes


def suppress(
    run: Run,
    *,
    unique_to: str | None = None,
    top: int | None = None,
    tokens: str | None = None,
    per_token: int | None = None,
    sites: Sequence[str] | None = None,
    subcomponents: Sequence[tuple[str, int]] | None = None,
    method: Method = "projection",
    threshold: float = ACTIVE,
    facts: Sequence[Fact] | None = None,
) -> Edit:
    """The edit that removes subcomponents from the target: those unique to a sentence, or those named by hand.

    unique_to: a sentence or a fact's prompt. Its own subcomponents, active in it and in no other sentence of the run, are removed.
    top, per_token: remove at most so many, in all or at each token, the highest importance × contribution first. Default to all.
    tokens: words of the sentence, such as the name; only subcomponents active at these words count.
    sites: patterns that a site must match. Defaults to all sites.
    subcomponents: pairs of site and number, instead of `unique_to`.
    facts: searched first for the sentence's answer, before the shipped facts; if none has it, the answer is the last word.
    Raises `ConfigError` or `SiteError` if a name or number does not exist.
    """
    if (unique_to is None) == (not subcomponents):
        raise ConfigError("suppress: give a sentence whose own subcomponents go, or a site and its subcomponents; one of the two")
    for name, number in (("top", top), ("per_token", per_token)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} {number}: give 1 or more")
    if unique_to is not None:
        ranked = unique(run, unique_to, tokens=tokens, sites=sites, threshold=threshold, facts=facts)
        if not ranked:
            own = run.config.task.own_sentences
            foreign = not any(sentence.startswith(unique_to.strip()) for sentence in own)
            about = (
                f". It is not a sentence of this run, and is compared with those that are ({'; '.join(own[:3])})" if foreign and own else ""
            )
            raise ConfigError(f"{unique_to!r}: no subcomponent is active in it alone (importance > {threshold:g}){about}; see inspect")
        chosen = _best(ranked, top=top, per_token=per_token)
    else:
        assert subcomponents is not None
        for site, c in subcomponents:
            require_subcomponent(run, site, c)
        chosen = [Selected(site, c) for site, c in dict.fromkeys(subcomponents)]
    return edit(run, chosen, method=method)


def edit(run: Run, selected: Sequence[Selected], *, method: Method = "projection") -> Edit:
    """The edit that removes the subcomponents `selected`."""
    task, weights = data_of(run), dict[str, Tensor]()
    with torch.no_grad():
        for site in run.decomposition.sites:
            index = [each.subcomponent for each in selected if each.site == site.name]
            if not index:
                continue
            reads, writes = run.decomposition.U[site.name][:, index], run.decomposition.V[site.name][index]
            weights[site.name] = taken_out(site.W, reads, writes, method)
    return Edit(task.model, task.tokenizer, tuple(selected), method, weights, tuple(_warnings(run)))


def _warnings(run: Run) -> Iterator[str]:
    """Reasons not to trust any edit made with this run's subcomponents."""
    if any(verdict.name == "target" for verdict in run.verdicts):
        yield "the target had not converged when its training ended: this is an edit of a half-trained model"
    if failed := failures(verdict for verdict in run.verdicts if verdict.name != "target"):
        yield f"the decomposition fails ({failed}): its subcomponents do not stand for what the model computes"


def _best(ranked: Sequence[Selected], *, top: int | None, per_token: int | None) -> list[Selected]:
    if per_token is not None:
        counts: dict[int | None, int] = {}
        kept: list[Selected] = []
        for each in ranked:
            counts[each.position] = counts.get(each.position, 0) + 1
            if counts[each.position] <= per_token:
                kept.append(each)
        ranked = kept
    return list(ranked[:top])


def unique(
    run: Run,
    sentence: str,
    *,
    tokens: str | None = None,
    sites: Sequence[str] | None = None,
    threshold: float = ACTIVE,
    facts: Sequence[Fact] | None = None,
) -> list[Selected]:
    """The subcomponents unique to a sentence, the largest importance × contribution at a token first.

    Each is given at the token where that product is largest. The contribution is a gradient in the target: no edit is tried.
    """
    require_threshold(threshold)
    fact = find_fact(run, sentence, facts)
    others = [other for other in run.config.task.own_sentences if other != fact.sentence]
    task, tokenizer = data_of(run), tokenizer_of(run)
    with at_rest(task.model), machine(run.config):
        prompt_ids, _ = encode_fact(tokenizer, fact.prompt, fact.answer)
        words = token_texts(tokenizer, prompt_ids)
        where = [i for i in positions_of(tokenizer, fact.prompt, tokens) if i < len(words)] if tokens is not None else range(len(words))
        if not where:
            raise ConfigError(f"tokens {tokens!r}: one token with the answer's start; name words that stand before it")
        seen = run_sentences(run, [fact.sentence, *others])
        slopes = answer_slopes(run, fact)
    named = {site.name for site in find_sites(task.model, sites)} if sites is not None else set(run.decomposition.names)
    chosen: list[Selected] = []
    for site in run.decomposition.names:
        if site not in named:
            continue
        here = active_in(seen, 0, threshold=threshold)[site]
        elsewhere = torch.stack([active_in(seen, i + 1, threshold=threshold)[site].any(0) for i in range(len(others))] or [here[0] & False])
        inner = run.decomposition.inner(site, seen.inputs[site][0, : len(words)])
        adds = inner * (slopes[site][: len(words)] @ run.decomposition.V[site].T)  # (pos, C), nats
        g = seen.g[site][0, : len(words)]
        score = torch.where(here[: len(words)], g * adds, -torch.inf)[list(where)]
        own = here[list(where)].any(0) & ~elsewhere.any(0)
        place = score.argmax(0)
        for c in own.nonzero()[:, 0].tolist():
            position = where[int(place[c])]
            importance, contribution = g[position, c].item(), adds[position, c].item()
            chosen.append(Selected(site, c, position, words[position], importance, contribution))
    return sorted(chosen, key=lambda each: -(each.importance or 0) * (each.contribution or 0))


def find_fact(run: Run, sentence: str, facts: Sequence[Fact] | None) -> Fact:
    """The fact of a sentence or prompt, from given facts, shipped ones, or the run's sentences. Raises `ConfigError` for one word."""
    known = [*(facts or ()), *shipped_facts(), *(fact_of(each, shipped_facts()) for each in run.config.task.own_sentences)]
    prompt = sentence.strip()
    found = next((fact for fact in known if prompt in (fact.prompt, fact.sentence)), None)
    found = found or fact_of(prompt, ())
    if not found.prompt:
        raise ConfigError(f"{sentence!r}: one word; give a sentence, its last word the answer")
    return found


def answer_slopes(run: Run, fact: Fact) -> dict[str, Float[Tensor, "pos d_out"]]:
    """∂ log p(answer) / ∂y in the target, for the output y of every site at every token of prompt and answer."""
    tokenizer, decomposition = tokenizer_of(run), run.decomposition
    before, answer = encode_fact(tokenizer, fact.prompt, fact.answer)
    ids = torch.tensor([before + answer], device=decomposition.device)
    shifts: dict[Site, Tensor] = {}

    def shifted(site: Site, x: Tensor, target: TargetRows) -> Tensor:
        output = target(0, len(x))
        shifts[site] = torch.zeros_like(output, requires_grad=True)
        return output + shifts[site]

    products = {site: Product(partial(shifted, site), leading=tuple(ids.shape)) for site in decomposition.sites}
    with torch.enable_grad(), replaced(products):
        log_probs = decomposition.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        said = log_probs[len(before) - 1 : -1].gather(1, ids[0, len(before) :, None]).sum()
        slopes = torch.autograd.grad(said, list(shifts.values()), allow_unused=True)
    found = zip(shifts, slopes, strict=True)
    return {site.name: (torch.zeros_like(shifts[site]) if slope is None else slope)[0] for site, slope in found}
