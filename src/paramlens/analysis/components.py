"""Single subcomponents of a run: which are active on which token, which are unique to a sentence, what one reads and writes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.analysis.held_out import data_of
from paramlens.analysis.streams import TOP, Read, Streams
from paramlens.display.result import Result
from paramlens.display.tables import Cell, Column, Table, columns, row, shaded, site_cell
from paramlens.errors import ConfigError, SiteError
from paramlens.kernels.machine import machine
from paramlens.method.batch import Batch
from paramlens.method.evaluate import importances
from paramlens.method.sites import at_rest
from paramlens.method.threshold import ACTIVE, require_threshold
from paramlens.runs.rundir import Run
from paramlens.tasks.language_models.encoding import encode_sentence, padded
from paramlens.tasks.language_models.limits import require_tokens

SEQUENCES = 6
"""Number of held-out sequences shown for a run that has no sentences of its own."""

INPUTS = 32
"""Number of inputs shown for a model whose inputs have no positions."""


@dataclass(frozen=True)
class Active:
    """A subcomponent active at a token."""

    site: str
    subcomponent: int
    position: int
    token: str
    importance: float
    """g, in [0, 1]."""
    inner: float
    """Inner activation x · u, where x is the site's input in the target."""
    written: float
    """Norm of what it writes at the token, |x · u| ‖v‖."""


@dataclass(frozen=True, repr=False)
class Inspection(Result):
    """Which subcomponents are active on which token of a sentence. unique: active in no other sentence of the run."""

    run: str
    step: int
    threshold: float
    prompt: str
    tokens: list[str]
    active: list[Active]
    unique: list[tuple[str, int]]
    by_site: dict[str, list[int]]
    """Site → number of active subcomponents at each position."""
    total: int
    """Number of subcomponents of the run: the sum of C over all sites."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        return f"{self.run}, step {self.step}: {self._different} of {self.total} active in {self.prompt!r}, {len(self.unique)} its own"

    def tables(self) -> tuple[Table, ...]:
        """One row per site, one column per token: how many subcomponents are active; last, how many are unique to the sentence."""
        own = [site for site, _ in self.unique]
        highest = max((max(counts) for counts in self.by_site.values()), default=0)
        sites = [
            (site_cell(site), *(shaded(str(count), count, highest) for count in counts), Cell(str(own.count(site))))
            for site, counts in self.by_site.items()
        ]
        sums = row("sum", *(str(sum(column)) for column in zip(*self.by_site.values(), strict=True)), str(len(own)), tone="strong")
        note = f"{self._different} of {self.total} are active in it, {len(own)} of them in no other sentence of the run"
        title = f"Active subcomponents (importance > {self.threshold:g}): {self.prompt}"
        return (Table(title, columns("site", *self.tokens, "own"), (*sites, sums), notes=(Cell(note),)),)

    @property
    def _different(self) -> int:
        return len({(each.site, each.subcomponent) for each in self.active})


@dataclass(frozen=True, repr=False)
class Subcomponent(Result):
    """One rank-1 subcomponent outer(u, v) of a site's weight.

    reads: tokens whose embedding, passed through the norm before the site, has the largest inner activation. positions: the same for
    position encodings. writes, suppresses: tokens whose logits v raises and lowers most on the direct path to the unembedding, with the
    scale of norms fixed and before a soft cap on logits. Each is empty where no such direct path was found.
    """

    run: str
    site: str
    subcomponent: int
    norm_u: float
    norm_v: float
    reads: list[Read]
    positions: list[Read]
    writes: list[Read]
    suppresses: list[Read]
    tokens: list[list[str]]
    """The tokens of every sentence."""
    importance: list[list[float]]
    """g at every token of every sentence."""
    inner: list[list[float]]
    """Inner activation at every token of every sentence."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        return f"{self.site}, subcomponent {self.subcomponent} of {self.run}: |u| {self.norm_u:.3g}, |v| {self.norm_v:.3g}"

    def tables(self) -> tuple[Table, ...]:
        """What it reads and writes, and its importance and inner activation at the tokens of every sentence."""
        listed = {"reads tokens": self.reads, "reads positions": self.positions, "raises": self.writes, "lowers": self.suppresses}
        about = Table(
            f"{self.site}, subcomponent {self.subcomponent}: |u| {self.norm_u:.3g}, |v| {self.norm_v:.3g}",
            (Column("", right=False), Column("", right=False, wraps=True)),
            tuple((Cell(name), _listed(entries)) for name, entries in listed.items()),
            headed=False,
        )
        sentences = zip(self.tokens, self.importance, self.inner, strict=True)
        return (about, *(_token_strip(*each) for each in sentences))


def _listed(entries: Sequence[Read]) -> Cell:
    text = "  ".join(f"{each.what!r} {each.value:+.2f}" for each in entries)
    return Cell(text) if text else Cell("no direct path from or to the residual stream was found", "faint")


def _token_strip(tokens: Sequence[str], importance: Sequence[float], inner: Sequence[float]) -> Table:
    rows = (
        (Cell("importance"), *(shaded(f"{value:.2f}", value, 1.0) for value in importance)),
        (Cell("inner"), *(Cell(f"{value:+.2f}") for value in inner)),
    )
    return Table("", columns("", *tokens), rows, strip=True)


@dataclass(frozen=True)
class Sentences:
    """What the target and γ give for sentences: token texts, site inputs x [sentence, pos, d_in] and g [sentence, pos, C]."""

    batch: Batch
    texts: tuple[tuple[str, ...], ...]
    inputs: Mapping[str, Float[Tensor, "sentence pos d_in"]]
    g: Mapping[str, Float[Tensor, "sentence pos C"]]
    roles: tuple[tuple[str, ...], ...] | None = None
    """Role of every token. None: the tokens have no roles."""


def tokenizer_of(run: Run) -> Any:
    """The run's tokenizer. Raises `ConfigError` if the target is not a language model."""
    tokenizer = data_of(run).tokenizer
    if tokenizer is None:
        raise ConfigError(f"{run.path}: no language model with a tokenizer, so there are no sentences to look at; see circuit")
    return tokenizer


@torch.no_grad()
def run_sentences(run: Run, sentences: Sequence[str]) -> Sentences:
    """Run the target and γ on `sentences`. Raises `BatchError` for a sentence of a single token, or longer than the model takes."""
    tokenizer = tokenizer_of(run)
    ids = [encode_sentence(tokenizer, sentence) for sentence in sentences]
    require_tokens(run.decomposition.model, ids, [f"sentence {sentence!r}" for sentence in sentences])
    batch = padded(tokenizer, ids).to(run.decomposition.device)
    target, g = importances(run.decomposition, run.importance, batch)
    assert batch.texts is not None
    return Sentences(batch, batch.texts, target.inputs, g)


@torch.no_grad()
def shown_sequences(run: Run, texts: Sequence[str] = ()) -> Sentences:
    """The sequences on which subcomponents are shown: `texts`, else the run's own sentences, else its first held-out sequences.

    A token without a text is shown as its number. Inputs without positions are shown as one sequence. Raises `ConfigError` for texts
    if there is no tokenizer.
    """
    if texts or run.config.task.own_sentences:
        return run_sentences(run, list(texts) or list(run.config.task.own_sentences))
    task = data_of(run)
    batch = _first(task.batch(0, "circuit"), INPUTS).to(run.decomposition.device)
    target, g = importances(run.decomposition, run.importance, batch)
    lead = next(iter(g.values())).shape[:-1]
    batch = batch if len(lead) == 1 else _first(batch, SEQUENCES)

    def as_sequences(value: Tensor) -> Tensor:
        return value[None] if len(lead) == 1 else value[:SEQUENCES].flatten(1, -2)

    g = {site: _own_first(as_sequences(value), batch.present) for site, value in g.items()}
    inputs = {site: _own_first(as_sequences(value), batch.present) for site, value in target.inputs.items()}
    sequences, length = next(iter(g.values())).shape[:2]
    ids = batch.token_ids
    if batch.texts is not None:
        named = batch.texts
    elif ids is not None and ids.shape == (sequences, length):
        names = [[task.token_names[i] if task.token_names else str(i) for i in row] for row in _own_first(ids, batch.present).tolist()]
        counts = [length] * sequences if batch.present is None else batch.present.sum(1).tolist()
        named = tuple(tuple(row[:count]) for row, count in zip(names, counts, strict=True))
    else:
        named = tuple(tuple(f"{'input' if len(lead) == 1 else 'position'} {i}" for i in range(length)) for _ in range(sequences))
    roles = None if batch.roles is None else tuple(tuple(task.roles[i] for i in row if i >= 0) for row in batch.roles.tolist())
    return Sentences(batch, named, inputs, g, roles)


def _own_first(values: Tensor, present: Tensor | None) -> Tensor:
    """Reorder values [sequence, pos, ...] so that the present positions of every sequence come first, in their order."""
    if present is None:
        return values
    order = (~present).sort(dim=1, stable=True).indices
    return values[torch.arange(len(values), device=values.device)[:, None], order]


def _first(batch: Batch, rows: int) -> Batch:
    """The first `rows` sequences of a batch."""
    return replace(batch.map(lambda tensor: tensor[:rows]), texts=batch.texts and batch.texts[:rows])


def active_in(sentences: Sentences, index: int, *, threshold: float) -> dict[str, Tensor]:
    """Site → (pos, C): which subcomponents are active at which token of sentence `index`, without padding."""
    length = len(sentences.texts[index])
    return {site: g[index, :length] > threshold for site, g in sentences.g.items()}


@torch.no_grad()
def inspect_prompt(run: Run, prompt: str | None = None, *, threshold: float = ACTIVE) -> Inspection:
    """The subcomponents active (g > threshold) on each token of `prompt`. Defaults to the run's first sentence.

    A subcomponent is unique to the prompt if it is active in no other sentence of the run; sentences that begin with the prompt do not
    count as others. Raises `ConfigError` if the target is not a language model.
    """
    require_threshold(threshold)
    own = run.config.task.own_sentences
    if prompt is None:
        if not own:
            raise ConfigError("inspect: give a prompt; the run decomposed running text and has no sentences of its own")
        prompt = own[0]
    task = data_of(run)
    with at_rest(task.model), machine(run.config):
        others = [sentence for sentence in own if not sentence.startswith(prompt)]
        sentences = run_sentences(run, [prompt, *others])
    active = active_in(sentences, 0, threshold=threshold)
    elsewhere = _anywhere(sentences, range(1, len(sentences.texts)), threshold)
    found: list[Active] = []
    for site, on in active.items():
        V, inner = run.decomposition.V[site], run.decomposition.inner(site, sentences.inputs[site][0])
        for position, c in on.nonzero().tolist():
            size = inner[position, c].item()
            importance = sentences.g[site][0, position, c].item()
            found.append(Active(site, c, position, sentences.texts[0][position], importance, size, abs(size) * V[c].norm().item()))
    return Inspection(
        run=str(run.path),
        step=run.step,
        threshold=threshold,
        prompt=prompt,
        tokens=list(sentences.texts[0]),
        active=found,
        unique=[(site, c) for site, on in active.items() for c in (on.any(0) & ~elsewhere[site]).nonzero()[:, 0].tolist()],
        by_site={site: on.sum(1).tolist() for site, on in active.items()},
        total=sum(run.decomposition.C.values()),
    )


def _anywhere(sentences: Sentences, indices: Iterable[int], threshold: float) -> dict[str, Tensor]:
    """Site → (C,): which subcomponents are active at any token of the sentences `indices`."""
    seen = {site: torch.zeros(g.shape[-1], dtype=torch.bool, device=g.device) for site, g in sentences.g.items()}
    for index in indices:
        for site, on in active_in(sentences, index, threshold=threshold).items():
            seen[site] |= on.any(0)
    return seen


def require_subcomponent(run: Run, site: str, subcomponent: int) -> None:
    """Raise `SiteError` unless the run has this subcomponent."""
    if site not in run.decomposition.names:
        raise SiteError(f"site {site}: not of this run; its sites: {', '.join(run.decomposition.names)}")
    C = run.decomposition.C[site]
    if not 0 <= subcomponent < C:
        raise SiteError(f"site {site}: no subcomponent {subcomponent}; there are {C}, 0 to {C - 1}")


@torch.no_grad()
def inspect_subcomponent(run: Run, site: str, subcomponent: int, *, texts: Sequence[str] = (), top: int = TOP) -> Subcomponent:
    """What one subcomponent reads and writes, and where it is active in `texts`. `texts` defaults as in `shown_sequences`.

    Raises `SiteError` if there is no such subcomponent, and `ConfigError` for a run on your own model that was opened without batches.
    """
    require_subcomponent(run, site, subcomponent)
    with at_rest(data_of(run).model), machine(run.config):
        shown = shown_sequences(run, texts)
        return described(run, site, [subcomponent], shown, Streams(run, shown.batch), top=top)[0]


def described(
    run: Run, site: str, subcomponents: Sequence[int], shown: Sentences, streams: Streams, *, top: int = TOP
) -> list[Subcomponent]:
    """`inspect_subcomponent` for several subcomponents of one site."""
    chosen = list(subcomponents)
    u, v = run.decomposition.U[site][:, chosen], run.decomposition.V[site][chosen]
    inner, g = run.decomposition.site(site).read(shown.inputs[site], u), shown.g[site][..., chosen]
    ends = zip(chosen, streams.reads(site, u, top=top), streams.writes(site, v, top=top), strict=True)
    return [
        Subcomponent(
            run=str(run.path),
            site=site,
            subcomponent=c,
            norm_u=u[:, i].norm().item(),
            norm_v=v[i].norm().item(),
            reads=tokens,
            positions=positions,
            writes=raised,
            suppresses=lowered,
            tokens=[list(words) for words in shown.texts],
            importance=[g[row, : len(words), i].tolist() for row, words in enumerate(shown.texts)],
            inner=[inner[row, : len(words), i].tolist() for row, words in enumerate(shown.texts)],
        )
        for i, (c, (tokens, positions), (raised, lowered)) in enumerate(ends)
    ]
