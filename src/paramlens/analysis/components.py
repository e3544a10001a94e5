"""Single subcomponents of a run: which are active on which token, which are a sentence's own, what one reads and writes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paramlens.analysis.held_out import data_of
from paramlens.config import FactsTask
from paramlens.errors import ConfigError, SiteError
from paramlens.evaluation import ACTIVE, importances
from paramlens.machine import machine
from paramlens.rundir import Run
from paramlens.shown import Shown
from paramlens.sites import at_rest
from paramlens.tables import Cell, Column, Table, columns, row, shaded, site_cell
from paramlens.tasks import Batch
from paramlens.tasks.language import encode_sentence, padded

TOP = 8
"""Tokens and positions listed of what a subcomponent reads and writes."""


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
    """Inner activation x · u, of the target's own input."""
    written: float
    """Length of what it writes there, |x · u| ‖v‖."""


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """Which subcomponents are active on which token of a sentence. unique: active in none of the other sentences of the run."""

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
    """Subcomponents of the run, C times its sites."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        return f"{self.run}, step {self.step}: {self._different} of {self.total} active in {self.prompt!r}, {len(self.unique)} its own"

    def tables(self) -> tuple[Table, ...]:
        """One row a site, one column a token: how many subcomponents are active; and how many are the sentence's own."""
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


@dataclass(frozen=True)
class Read:
    """A token or position, and how strongly a subcomponent reads or writes it."""

    what: str
    value: float


@dataclass(frozen=True, repr=False)
class Subcomponent(Shown):
    """One rank-1 part outer(u, v) of a site's weight.

    reads: tokens whose embedding, through the norm before the site, has the largest inner activation; positions: likewise; both empty for
    a site that reads no norm's output. writes, suppresses: tokens whose logit it raises and lowers most, through the final norm's gain;
    empty for a site that does not write to the residual stream.
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
    """Sentences as tokens."""
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
    return Cell(text) if text else Cell("not of the residual stream", "faint")


def _token_strip(tokens: Sequence[str], importance: Sequence[float], inner: Sequence[float]) -> Table:
    rows = (
        (Cell("importance"), *(shaded(f"{value:.2f}", value, 1.0) for value in importance)),
        (Cell("inner"), *(Cell(f"{value:+.2f}") for value in inner)),
    )
    return Table("", columns("", *tokens), rows, strip=True)


@dataclass(frozen=True)
class Sentences:
    """Sentences through the target and γ: texts of the tokens, site inputs x [sentence, pos, d_in] and g [sentence, pos, C]."""

    batch: Batch
    texts: tuple[tuple[str, ...], ...]
    inputs: Mapping[str, Tensor]
    g: Mapping[str, Float[Tensor, "sentence pos C"]]


def tokenizer_of(run: Run) -> Any:
    """The run's tokenizer. Raises `ConfigError` for a run on no language model."""
    tokenizer = data_of(run).tokenizer
    if tokenizer is None:
        raise ConfigError(f"{run.path}: no language model with a tokenizer, so there are no sentences to look at; see circuit")
    return tokenizer


def own_sentences(run: Run) -> tuple[str, ...]:
    """What a facts run decomposed; none for any other."""
    task = run.config.task
    return task.sentences if isinstance(task, FactsTask) else ()


@torch.no_grad()
def run_sentences(run: Run, sentences: Sequence[str]) -> Sentences:
    """The target and γ on `sentences`. Raises `BatchError` for one of a single token."""
    tokenizer = tokenizer_of(run)
    batch = padded(tokenizer, [encode_sentence(tokenizer, sentence) for sentence in sentences]).to(run.decomposition.device)
    target, g = importances(run.decomposition, run.importance, batch)
    assert batch.texts is not None
    return Sentences(batch, batch.texts, target.inputs, g)


def active_in(sentences: Sentences, index: int, *, threshold: float) -> dict[str, Tensor]:
    """Site → (pos, C), where subcomponents are active in sentence `index`; its own tokens alone."""
    length = len(sentences.texts[index])
    return {site: g[index, :length] > threshold for site, g in sentences.g.items()}


def require_threshold(threshold: float) -> None:
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold {threshold}: importances lie in [0, 1], so give a number from 0 to below 1")


@torch.no_grad()
def inspect_prompt(run: Run, prompt: str | None = None, *, threshold: float = ACTIVE) -> Inspection:
    """The subcomponents active (g > threshold) on each token of `prompt`; none: the run's first sentence.

    Those of its own are active in no other sentence of the run. Raises `ConfigError` for a run on no language model.
    """
    require_threshold(threshold)
    own = own_sentences(run)
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
        U, V = run.decomposition.U[site], run.decomposition.V[site]
        inner = sentences.inputs[site][0] @ U
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
        total=run.decomposition.C * len(run.decomposition.sites),
    )


def _anywhere(sentences: Sentences, indices: Iterable[int], threshold: float) -> dict[str, Tensor]:
    """Site → (C,), whether a subcomponent is active at any token of any of the sentences."""
    seen = {site: torch.zeros(g.shape[-1], dtype=torch.bool, device=g.device) for site, g in sentences.g.items()}
    for index in indices:
        for site, on in active_in(sentences, index, threshold=threshold).items():
            seen[site] |= on.any(0)
    return seen


def require_subcomponent(run: Run, site: str, subcomponent: int) -> None:
    """Raise `SiteError` unless the run has it."""
    names, C = run.decomposition.names, run.decomposition.C
    if site not in names:
        raise SiteError(f"site {site}: not of this run; its sites: {', '.join(names)}")
    if not 0 <= subcomponent < C:
        raise SiteError(f"site {site}: no subcomponent {subcomponent}; there are {C}, 0 to {C - 1}")


@torch.no_grad()
def inspect_subcomponent(run: Run, site: str, subcomponent: int, *, texts: Sequence[str] = (), top: int = TOP) -> Subcomponent:
    """What one subcomponent reads and writes, and where it is active in `texts`; none: in the run's own sentences.

    Raises `SiteError` if there is no such subcomponent.
    """
    require_subcomponent(run, site, subcomponent)
    tokenizer, task = tokenizer_of(run), data_of(run)
    own = list(texts) or list(own_sentences(run))
    u, v = run.decomposition.U[site][:, subcomponent], run.decomposition.V[site][subcomponent]
    with at_rest(task.model), machine(run.config):
        sentences = run_sentences(run, own) if own else None
        norms = _norms(run, sentences.batch if sentences else task.batch(0, "circuit").to(run.decomposition.device))
        read, positions = _reads(run, site, u, norms, tokenizer, top)
        raised, lowered = _writes(run, site, v, norms, tokenizer, top)
    inner, importance = list[list[float]](), list[list[float]]()
    for i, words in enumerate(sentences.texts if sentences else ()):
        assert sentences is not None
        inner.append((sentences.inputs[site][i, : len(words)] @ u).tolist())
        importance.append(sentences.g[site][i, : len(words), subcomponent].tolist())
    return Subcomponent(
        run=str(run.path),
        site=site,
        subcomponent=subcomponent,
        norm_u=u.norm().item(),
        norm_v=v.norm().item(),
        reads=read,
        positions=positions,
        writes=raised,
        suppresses=lowered,
        tokens=[list(words) for words in sentences.texts] if sentences else [],
        importance=importance,
        inner=inner,
    )


@dataclass(frozen=True)
class _Norms:
    """The norm whose output each site is given, and the one that the unembedding is given."""

    before: dict[str, nn.Module]
    final: nn.Module | None


def _norms(run: Run, batch: Batch) -> _Norms:
    """Found by identity: a norm's output is the very tensor that the module after it is given."""
    model: Any = run.decomposition.model
    made: list[tuple[Any, nn.Module]] = []
    given: dict[nn.Module, Any] = {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    readers = {site.module for site in run.decomposition.sites} | ({head} if head is not None else set())
    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    hooks = [norm.register_forward_hook(lambda module, _args, output: made.append((output, module))) for norm in norms]
    hooks += [
        reader.register_forward_pre_hook(lambda module, args, kwargs: given.update({module: _first(args, kwargs)}), with_kwargs=True)
        for reader in readers
    ]
    try:
        run.decomposition.masked_run(batch.inputs, [{}])
    finally:
        for hook in hooks:
            hook.remove()

    def maker(tensor: Any) -> nn.Module | None:  # the unembedding may be given a slice of it
        return next((norm for output, norm in made if output is tensor or (tensor is not None and tensor._base is output)), None)

    before = {site.name: norm for site in run.decomposition.sites if (norm := maker(given.get(site.module))) is not None}
    return _Norms(before, maker(given.get(head)) if head is not None else None)


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _reads(run: Run, site: str, u: Tensor, norms: _Norms, tokenizer: Any, top: int) -> tuple[list[Read], list[Read]]:
    norm, model = norms.before.get(site), run.decomposition.model
    embedding = _embedding(model)
    if norm is None or embedding is None or embedding.shape[1] != len(u):
        return [], []
    read = norm(embedding) @ u
    tokens = _top(read, read.abs(), _texts(tokenizer, len(read)), top)
    table = next((value for name, value in model.named_parameters() if name.rsplit(".", 2)[-2:] == ["wpe", "weight"]), None)
    if table is None:
        return tokens, []
    at = norm(table) @ u
    return tokens, _top(at, at.abs(), [str(i) for i in range(len(at))], top)


def _writes(run: Run, site: str, v: Tensor, norms: _Norms, tokenizer: Any, top: int) -> tuple[list[Read], list[Read]]:
    model: Any = run.decomposition.model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if site in norms.before or head is None or head.weight.shape[1] != len(v):
        return [], []
    logits = head.weight @ _through_gain(norms.final, v)
    names = _texts(tokenizer, len(logits))
    return _top(logits, logits, names, top), _top(logits, -logits, names, top)


def _through_gain(norm: Any, v: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
    """A direction as it passes a norm whose scale is fixed by the rest of the stream: centred by a LayerNorm, times the gain."""
    if norm is None:
        return v
    centred = v - v.mean() if isinstance(norm, nn.LayerNorm) else v
    return centred if norm.weight is None else centred * norm.weight


def _embedding(model: Any) -> Tensor | None:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return None if embedding is None else embedding.weight


def _texts(tokenizer: Any, count: int) -> list[str]:
    from paramlens.tasks.language import token_texts

    known = token_texts(tokenizer, list(range(min(count, len(tokenizer)))))
    return known + [f"<{i}>" for i in range(len(known), count)]


def _top(values: Tensor, order: Tensor, names: list[str], top: int) -> list[Read]:
    return [Read(names[i], values[i].item()) for i in order.topk(min(top, len(values))).indices.tolist()]
