"""The direct paths of a model, measured: how a token's embedding reaches a site, and how a site's output reaches the unembedding.

Direct means along the residual stream and through norms only. To isolate such paths, the outputs of all weight matrices and norms are
held fixed while the embeddings are moved: which inputs move with them? Then gradients are stopped at these outputs: which outputs have
the gradient of the stream's end? Nothing is concluded from names. All other paths are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from paramlens.analysis.norms import Norm, factor, norm_of
from paramlens.errors import SiteError
from paramlens.method.batch import Inputs, map_tensors, tensors_of
from paramlens.method.decomposition import call
from paramlens.method.generators import generator
from paramlens.method.hooks import hooked
from paramlens.method.sites import Site, find_sites

_POSITIONS = 16
"""Number of positions of the one sequence that is run."""

Map = Callable[[Tensor], Tensor]
"""Vectors [row, d] → the same vectors after a part of the model."""


@dataclass(frozen=True)
class Reading:
    """The map from a token's embedding to a site's input, and the map from a vector of the residual stream."""

    embedding: Map
    stream: Map


@dataclass(frozen=True)
class Paths:
    """reads: for sites that the stream reaches directly. writes: for sites whose output reaches the unembedding directly, the map from
    output to logits; attention's values pass the output projection of the heads first.
    """

    reads: dict[str, Reading]
    writes: dict[str, Map]


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module without children: copies of its input and output, as a model may write to either later."""

    module: nn.Module
    given: Tensor
    output: Tensor


@torch.no_grad()
def find_paths(model: nn.Module, sites: Sequence[Site], inputs: Inputs, *, embedding: nn.Module | None, head: nn.Module | None) -> Paths:
    """Find the direct paths of `sites`. Runs the first sequence of `inputs` four times at most."""
    inputs = _start(inputs)
    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    calls, logits = _calls(model, leaves, inputs)
    norms = {
        each.module: norm
        for each in calls
        if each.given.shape == each.output.shape and (norm := norm_of(each.module, each.given)) is not None
    }
    held = [module for module in leaves if module is not embedding and (module in norms or any(True for _ in module.parameters()))]
    measured = _Measured(model, inputs, calls, norms, held)
    reads = measured.reads(sites, embedding) if embedding is not None else {}
    writes = measured.writes(sites, head, logits) if head is not None else {}
    return Paths(reads, writes)


def _start(inputs: Inputs) -> Inputs:
    """The first sequence, cut to its first positions if every tensor is [batch, pos]."""
    flat = all(tensor.dim() == 2 and not tensor.is_floating_point() for tensor in tensors_of(inputs))
    return map_tensors(lambda tensor: tensor[:1, :_POSITIONS] if flat else tensor[:1], inputs)


def _calls(model: nn.Module, leaves: Sequence[nn.Module], inputs: Inputs) -> tuple[list[_Call], Tensor]:
    calls: list[_Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = _given(args, kwargs)
        if isinstance(given, Tensor) and isinstance(output, Tensor) and output.is_floating_point():
            calls.append(_Call(module, given.clone(), output.clone()))

    with hooked([(module, keep) for module in leaves]):
        logits = call(model, inputs)
    return calls, logits


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


class _Measured:
    """A model's run on one sequence, and what is found by running it again with some outputs held fixed."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, calls: Sequence[_Call], norms: Mapping[nn.Module, Norm], held: Sequence[nn.Module]
    ) -> None:
        self.model, self.inputs, self.calls, self.norms, self.held = model, inputs, calls, norms, set(held)
        counts = {each.module: 0 for each in calls}
        for each in calls:
            counts[each.module] += 1
        self.once = {each.module: each for each in calls if counts[each.module] == 1}
        """Module → its call, for modules that are called once."""

    def reads(self, sites: Sequence[Site], embedding: nn.Module) -> dict[str, Reading]:
        own = self.once.get(embedding)
        if own is None:
            return {}
        first = [each.module for each in self.calls if each.module in self.norms and factor(each.given, own.output) is not None][:1]
        found = [self._reads(sites, own, norm) for norm in (None, *first)]  # a norm may stand between the embedding and the stream
        return max(found, key=len)

    def _reads(self, sites: Sequence[Site], embedding: _Call, norm: nn.Module | None) -> dict[str, Reading]:
        size = max(each.given.std().item() for each in self.calls if each.given.is_floating_point())
        by = size * torch.randn(embedding.output.shape, generator=generator("paths"), dtype=torch.float64).to(embedding.output)
        moved = self._moved(embedding.module, by, free=norm)
        enters = nn.Identity() if norm is None else norm
        expected = enters(embedding.output + by) - enters(embedding.output)
        found: dict[str, Reading] = {}
        for site in sites:
            own = self._call_of(site)
            made = self._maker(own.given, before=own) if own is not None else None
            given, c = made or (own, 1.0)
            if given is None or given.module not in moved or given.module is norm:
                continue
            scale = factor(moved[given.module] - given.given, expected)
            if scale is not None:
                passes = _scaled(nn.Identity() if made is None else given.module, c)
                found[site.name] = Reading(_chained(enters, _scaled(nn.Identity(), scale), passes), passes)
        return found

    def _moved(self, embedding: nn.Module, by: Tensor, *, free: nn.Module | None) -> dict[nn.Module, Tensor]:
        """The input of every module when the embedding is moved and all held modules but `free` return their earlier output."""
        outputs = {each.module: each.output for each in self.once.values()}
        seen: dict[nn.Module, Tensor] = {}

        def hold(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            given = _given(args, kwargs)
            if isinstance(given, Tensor):
                seen[module] = given.clone()
            if module is embedding:
                return output + by
            return outputs[module].clone() if module in self.held and module is not free else output

        with hooked([(module, hold) for module in self.once]):
            call(self.model, self.inputs)
        return seen

    def _maker(self, given: Tensor, *, before: _Call | None = None) -> tuple[_Call, float] | None:
        """The last norm whose output, times a number, is `given`, and this number."""
        earlier = self.calls if before is None else self.calls[: self.calls.index(before)]
        for each in reversed(earlier):
            if each.module in self.norms and each.module in self.once and (c := factor(given, each.output)) is not None:
                return each, c
        return None

    def writes(self, sites: Sequence[Site], head: nn.Module, logits: Tensor) -> dict[str, Map]:
        end, W = self.once.get(head), getattr(head, "weight", None)
        if end is None or not isinstance(W, Tensor) or W.dim() != 2 or W.shape[1] != end.given.shape[-1]:
            return {}
        bias = getattr(head, "bias", None)
        if factor(end.output - (0 if bias is None else bias), end.given @ W.T) is None:
            return {}
        final = self._maker(end.given)
        slopes, along = self._slopes(end if final is None else final[0])
        scale = factor(logits, end.output) or 1.0  # None if logits are capped: these are logits before the cap
        last: Map = nn.Identity() if final is None else _scaled(self.norms[final[0].module], final[1])
        to_logits = _chained(last, lambda v: v @ W.T, _scaled(nn.Identity(), scale))
        to_end = {site.name: passes for site in sites if (passes := self._to_end(site, slopes, along)) is not None}
        found = {name: _chained(passes, to_logits) for name, passes in to_end.items()}
        for site in sites:
            after = self._values_output(site) if site.name not in found else None
            passes = None if after is None else self._to_end(after, slopes, along)
            if after is not None and passes is not None:
                found[site.name] = _chained(lambda v, W=after.W: v @ W, passes, to_logits)
        return found

    def _slopes(self, end: _Call) -> tuple[dict[nn.Module, Tensor], Tensor]:
        """Gradient of Σ_pos `along` · (input of `end`) to each held output, with gradients stopped there; and the random vector `along`."""
        along = torch.randn(end.given.shape[-1], generator=generator("paths"), dtype=torch.float64).to(end.given)
        cut: dict[nn.Module, Tensor] = {}
        sums: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if module is end.module:
                sums.append((_given(args, kwargs) * along).sum())
            if module not in self.held:
                return None
            cut[module] = output.detach().requires_grad_()
            return cut[module].clone()

        with torch.enable_grad(), hooked([(module, keep) for module in self.once]):
            call(self.model, self.inputs)
        if not sums or not sums[0].requires_grad:
            return {}, along
        slopes = torch.autograd.grad(sums[0], list(cut.values()), allow_unused=True)
        return {module: slope for module, slope in zip(cut, slopes, strict=True) if slope is not None}, along

    def _call_of(self, site: Site) -> "_Call | None":
        """The call of the site's module. None: the site has no module, or it is called more than once."""
        return None if site.module is None else self.once.get(site.module)

    def _to_end(self, site: Site, slopes: Mapping[nn.Module, Tensor], along: Tensor) -> Map | None:
        """The map from a site's output to the end of the stream. None: there is no direct path."""
        own = self._call_of(site)
        if own is None or site.columns is not None:
            return None

        def adds(module: nn.Module) -> float | None:  # the factor at which its output is added to the stream
            slope = slopes.get(module)
            return None if slope is None or slope.shape[-1] != len(along) else factor(slope, along.expand_as(slope))

        c = adds(own.module)
        if c is not None:
            return _scaled(nn.Identity(), c)
        for each in self.calls[self.calls.index(own) :]:  # a norm may follow, as after the MLP of Gemma 2
            if each.module in self.norms and (before := factor(each.given, own.output)) and (after := adds(each.module)):
                return _scaled(self.norms[each.module], before * after)
        return None

    def _values_output(self, site: Site) -> Site | None:
        """If the site is attention's values, the output projection. It is found at the first position, which attends only to itself."""
        own = self._call_of(site)
        if own is None or own.output.dim() != 3:
            return None
        values = own.output[:, 0] if site.columns is None else own.output[:, 0, site.columns]
        names = {module: name for name, module in self.model.named_modules()}
        for each in self.calls[self.calls.index(own) + 1 :]:
            same = each.given.dim() == 3 and factor(each.given[:, 0], values) == 1.0
            found = _site(self.model, names[each.module]) if same and each.module in self.held and each.module not in self.norms else None
            if found is not None:
                return found
        return None


def _site(model: nn.Module, name: str) -> Site | None:
    try:
        return find_sites(model, [name])[0]
    except SiteError:
        return None


def _scaled(passes: Map, by: float) -> Map:
    return passes if by == 1.0 else lambda v: passes(v) * by


def _chained(*maps: Map) -> Map:
    return lambda v: reduce(lambda given, each: each(given), maps, v)
