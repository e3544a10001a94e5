"""nn.Linear and transformers' Conv1D: modules that are x @ W + bias, and the slices (queries, keys, values) of a fused projection."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paramlens.method.hooks import given_input, hooked, swapped_in
from paramlens.method.sites.fused import PARTS, fused_columns
from paramlens.method.sites.site import Offer, Place, Product, Seen, Site, suffixed


class LinearSite(Site):
    """The weight of a module that is x @ W + bias. nn.Linear stores the transpose of W, Conv1D stores W."""

    def __init__(self, name: str, module: nn.Module, columns: Tensor | None = None) -> None:
        super().__init__(name, ModulePlace(module))
        self._module, self._columns = module, columns

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def columns(self) -> Tensor | None:
        return self._columns

    @property
    def stored(self) -> Tensor:
        return weight_of(self._module)

    @property
    def W(self) -> Float[Tensor, "d_in d_out"]:
        W = _as_used(self._module)
        return W if self._columns is None else W[:, self._columns.to(W.device)]

    @property
    def bias(self) -> Float[Tensor, "d_out"] | None:
        bias = getattr(self._module, "bias", None)
        return bias if bias is None or self._columns is None else bias[self._columns.to(bias.device)]

    @property
    def d_in(self) -> int:
        return _as_used(self._module).shape[0]

    @property
    def d_out(self) -> int:
        return _as_used(self._module).shape[1] if self._columns is None else len(self._columns)

    @torch.no_grad()
    def write(self, W: Float[Tensor, "d_in d_out"]) -> None:
        stored = _as_used(self._module)
        if self._columns is None:
            stored.copy_(W)
        else:
            stored[:, self._columns.to(stored.device)] = W.to(stored)

    @torch.no_grad()
    def refusal(self) -> str | None:
        """None if the module's forward is x @ W + bias: the library's forward, or one with equal results (not tested on meta weights)."""
        module, weight = self._module, self.stored
        plain = next(kind for kind in _kinds() if isinstance(module, kind))
        if (type(module).forward is plain.forward and "forward" not in module.__dict__) or weight.is_meta:
            return None
        site = LinearSite("", module)
        x = torch.arange(2 * 3 * site.d_in, dtype=torch.float64).cos().view(2, 3, -1).to(weight)
        expected = x @ site.W if site.bias is None else x @ site.W + site.bias
        reason = f"{type(module).__name__} has a forward of its own, not x @ W + bias"
        try:
            given = module.forward(x)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return reason
        close = isinstance(given, Tensor) and given.shape == expected.shape and given.dtype == expected.dtype
        return None if close and bool((given - expected).abs().max() <= 1e-4 * expected.abs().max()) else reason


@dataclass(frozen=True)
class ModulePlace(Place):
    """The forward of a module that is x @ W + bias."""

    module: nn.Module

    @contextmanager
    def watched(self, sites: Sequence[Site], see: Seen) -> Iterator[None]:
        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for site in sites:
                see(site, given_input(args, kwargs))

        with hooked(before=[(self.module, look)]):
            yield

    @contextmanager
    def replaced(self, products: Mapping[Site, Product]) -> Iterator[None]:
        forward = partial(_joined, list(products.items()), self.module.forward)
        with swapped_in({self.module: forward}), hooked(before=[(self.module, _keep_fast_paths_off)]):
            yield

    def replaced_weights(self, sites: Sequence[Site]) -> tuple[Tensor, ...]:
        return tuple(site.stored for site in sites if site.columns is None)


def _keep_fast_paths_off(_module: nn.Module, _args: object, _kwargs: object) -> None:
    """A hook that does nothing: nn.TransformerEncoderLayer calls its modules only if one of them has a hook."""


def _joined(products: Sequence[tuple[Site, Product]], original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a module with its sites replaced: the whole weight, or slices of a fused projection."""
    given = given_input(args, kwargs)
    site, product = products[0]
    x = product.aligned(given)
    if site.columns is None:
        output = product.compute(x, lambda start, end: original(x[start:end]))
    else:
        output = whole = original(x)
        for site, product in products:
            assert site.columns is not None
            columns = site.columns.to(x.device)
            own = whole.index_select(-1, columns)
            output = output.index_copy(-1, columns, product.compute(x, lambda start, end, own=own: own[start:end]))
    return output.view(*given.shape[:-1], -1) if given.dim() != x.dim() else output


def offers(model: nn.Module, name: str, module: nn.Module) -> Iterator[Offer]:
    """The module as a site, and the slices of a fused projection."""
    if not isinstance(module, _kinds()) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return
    yield Offer(LinearSite(name, module), name)
    stored = weight_of(module)
    if stored.dim() != 2:  # packed or quantised
        return
    d_in, d_out = _as_used(module).shape
    columns = fused_columns(model, name, d_in=d_in, width=d_out)
    for part in PARTS if columns is not None else ():
        assert columns is not None
        yield Offer(LinearSite(suffixed(name, part), module, columns[part].to(stored.device)), name, part)


def _kinds() -> tuple[type[nn.Module], ...]:
    """The classes that are `x @ W + bias`; a model can contain a `Conv1D` only if transformers has been imported."""
    library = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear,) if library is None else (nn.Linear, library.Conv1D)


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight, which a parametrization computes."""
    return cast("Tensor", module.weight)


def _as_used(module: nn.Module) -> Tensor:
    """The whole weight [d_in, d_out], as a view of the stored one."""
    stored = weight_of(module)
    return stored.T if isinstance(module, nn.Linear) else stored
