"""What stands at either end of a site: tokens and positions whose vectors reach it directly, and the logits that its output reaches.

Reads are taken against the embeddings as they pass the norm before the site; writes go through the final norm's gain to the unembedding,
attention's values through the output projection beside them first. Whatever else a site is given or puts out is made by other parts of
the model, and is told by where its subcomponents are active.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from paramlens.analysis.held_out import data_of
from paramlens.rundir import Run
from paramlens.sites import Site, named_sites
from paramlens.tasks import Batch
from paramlens.tasks.induction import InductionTransformer
from paramlens.tasks.language import token_texts

TOP = 8
"""Tokens and positions listed of what a subcomponent reads and writes."""

_OUTPUTS = {"v": "o", "v_proj": "o_proj", "c_attn[v]": "c_proj"}
"""Leaf of a value projection → of the projection that takes the heads' output back to the stream."""


@dataclass(frozen=True)
class Read:
    """A token or position, and how strongly a subcomponent reads or writes it."""

    what: str
    value: float


class Streams:
    """Both ends of every site of a run; found by running `batch` once."""

    def __init__(self, run: Run, batch: Batch) -> None:
        self.model: Any = run.decomposition.model
        self._task = data_of(run)
        self._sites = {site.name: site for site in run.decomposition.sites}
        self._norms = _norms(run, batch)
        self._names: list[str] = []

    def reads(self, site: str, u: Float[Tensor, "d_in part"], *, top: int = TOP) -> list[tuple[list[Read], list[Read]]]:
        """For every part the tokens, and the positions, of the largest inner activation, either sign; empty where none reach the site."""
        norm, embedding = self._before(site), _weight(self.model, "get_input_embeddings")
        if norm is None or embedding is None or embedding.shape[1] != len(u):
            return [([], [])] * u.shape[1]
        tokens = (norm(embedding) @ u).T
        named = [_top(row, row.abs(), self._texts(len(row)), top) for row in tokens]
        table = _positions(self.model, site)
        if table is None:
            return [(each, []) for each in named]
        at = (norm(table) @ u).T
        return [(each, _top(row, row.abs(), [str(i) for i in range(len(row))], top)) for each, row in zip(named, at, strict=True)]

    def writes(self, site: str, v: Float[Tensor, "part d_out"], *, top: int = TOP) -> list[tuple[list[Read], list[Read]]]:
        """For every part the tokens whose logits it raises, and lowers, most; empty where it does not write to the residual stream."""
        head, to_stream = _weight(self.model, "get_output_embeddings"), self._to_stream(site)
        if head is None or to_stream is None or head.shape[1] != to_stream(v).shape[1]:
            return [([], [])] * len(v)
        logits = _through_gain(self._norms.final, to_stream(v)) @ head.T
        names = self._texts(logits.shape[1])
        return [(_top(row, row, names, top), _top(row, -row, names, top)) for row in logits]

    def _before(self, site: str) -> Callable[[Tensor], Tensor] | None:
        """What a vector of the residual stream passes on its way to the site; none: the site is given something else."""
        if isinstance(self.model, InductionTransformer):
            return nn.Identity()  # every projection of this model reads the stream as it is
        return self._norms.before.get(site)

    def _to_stream(self, site: str) -> Callable[[Tensor], Tensor] | None:
        start, _, leaf = site.rpartition(".")
        if leaf in _OUTPUTS:
            [out] = _found(self.model, f"{start}.{_OUTPUTS[leaf]}") or [None]
            return None if out is None or out.d_in != self._sites[site].d_out else lambda v: v @ out.W
        inside = site in self._norms.before or isinstance(self.model, InductionTransformer)
        return None if inside else lambda v: v

    def _texts(self, count: int) -> list[str]:
        if len(self._names) != count:
            tokenizer = self._task.tokenizer
            known = token_texts(tokenizer, list(range(min(count, len(tokenizer))))) if tokenizer else list(self._task.token_names)
            self._names = known + [f"<{i}>" if known else str(i) for i in range(len(known), count)]
        return self._names


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
    head = _named(model, "get_output_embeddings")
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


def _weight(model: Any, getter: str) -> Tensor | None:
    """Input or output embeddings of a model that names them, [token, d]; a model of images names patches, which are none."""
    weight = getattr(_named(model, getter), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _named(model: Any, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)() if hasattr(model, getter) else None
    except NotImplementedError:  # what transformers' models without any do
        return None


def _positions(model: Any, site: str) -> Tensor | None:
    """Position encodings that reach the site, [pos, d]; none for a model without a table of them."""
    if isinstance(model, InductionTransformer):
        seen = model.blocks[0].get_submodule("attn").added == "before" and not site.endswith(".v")
        return model.positions if seen else None
    return next((value for name, value in model.named_parameters() if name.rsplit(".", 2)[-2:] == ["wpe", "weight"]), None)


def _found(model: nn.Module, name: str) -> list[Site]:
    present = name in dict(model.named_modules())
    return list(named_sites(model, [name])) if present else []


def _through_gain(norm: Any, v: Float[Tensor, "part d"]) -> Float[Tensor, "part d"]:
    """Directions as they pass a norm whose scale is fixed by the rest of the stream: centred by a LayerNorm, times the gain."""
    if norm is None:
        return v
    centred = v - v.mean(1, keepdim=True) if isinstance(norm, nn.LayerNorm) else v
    return centred if norm.weight is None else centred * norm.weight


def _top(values: Tensor, order: Tensor, names: list[str], top: int) -> list[Read]:
    return [Read(names[i], values[i].item()) for i in order.topk(min(top, len(values))).indices.tolist()]
