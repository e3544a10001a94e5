"""Sites: the weight matrices of a model that are decomposed, each as W [d_in, d_out] in `y = x @ W + bias`.

The orientation is decided here and nowhere else: `nn.Linear` stores the transpose of W, transformers' `Conv1D` stores W. A fused
projection, one weight that makes queries, keys and values together, can also be taken apart: `...c_attn[q]` is the site of its queries.
"""

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paramlens.errors import SiteError

PARTS = ("q", "k", "v")
"""Slices of a fused projection."""


@dataclass(frozen=True)
class Site:
    """One decomposed weight matrix; `name` is its module's path in the model, with [q], [k] or [v] for a slice of a fused projection.

    columns: those of the module's output that belong to the site; none: all.
    """

    name: str
    module: nn.Module
    columns: Tensor | None = None

    @property
    def W(self) -> Float[Tensor, "d_in d_out"]:
        """The target's weight, as used in `x @ W`."""
        stored = _weight(self.module)
        W = stored.T if isinstance(self.module, nn.Linear) else stored
        return W if self.columns is None else W[:, self.columns.to(W.device)]

    @property
    def bias(self) -> Float[Tensor, "d_out"] | None:
        bias = getattr(self.module, "bias", None)
        return bias if bias is None or self.columns is None else bias[self.columns.to(bias.device)]

    @property
    def d_in(self) -> int:
        rows, columns = _weight(self.module).shape
        return columns if isinstance(self.module, nn.Linear) else rows

    @property
    def d_out(self) -> int:
        return len(self.columns) if self.columns is not None else _width(self.module)

    @torch.no_grad()
    def write(self, W: Float[Tensor, "d_in d_out"]) -> None:
        """Set the model's weight to `W`, in place."""
        stored = _weight(self.module)
        if self.columns is None:
            stored.copy_(W.T if isinstance(self.module, nn.Linear) else W)
        elif isinstance(self.module, nn.Linear):
            stored[self.columns.to(stored.device)] = W.T.to(stored)
        else:
            stored[:, self.columns.to(stored.device)] = W.to(stored)


def find_sites(model: nn.Module, patterns: Sequence[str]) -> tuple[Site, ...]:
    """The sites whose name matches any of `patterns` (`*`, `?`, `[..]`), in the model's own order.

    A module path names a whole weight. Of a fused projection, `...c_attn[q]`, `[k]` and `[v]` name slices, `...c_attn[qv]` two of them.
    Raises `SiteError` for a pattern that matches none, for a weight that the model uses in a second place (a tied weight), and for a
    fused projection that is taken both whole and in slices.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, _kinds())}
    fused = {name: columns for name, module in found.items() if (columns := _fused_columns(model, name, module)) is not None}
    chosen: dict[str, set[str | None]] = {}
    for pattern in patterns:
        named = [(name, None) for name in found if fnmatchcase(name, pattern)]
        base, part = _part_pattern(pattern)
        if part is not None:
            named += [(name, each) for name in fused if fnmatchcase(name, base) for each in PARTS if fnmatchcase(each, part)]
        if not named:
            raise SiteError(_no_match(pattern, [*found, *(f"{name}[{each}]" for name in fused for each in PARTS)]))
        for name, each in named:
            chosen.setdefault(name, set()).add(each)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    sites: list[Site] = []
    for name, module in found.items():
        if name not in chosen:
            continue
        _require_own_weight(name, module, owners)
        if None in chosen[name]:
            if len(chosen[name]) > 1:
                raise SiteError(f"sites: {name} is taken whole and in slices; leave one of them out")
            sites.append(Site(name, module))
        else:
            sites += [Site(f"{name}[{part}]", module, fused[name][part]) for part in PARTS if part in chosen[name]]
    return tuple(sites)


def _kinds() -> tuple[type[nn.Module], ...]:
    """The modules that are `x @ W + bias`; a model can only hold a `Conv1D` if transformers has been imported."""
    library = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear,) if library is None else (nn.Linear, library.Conv1D)


def _weight(module: nn.Module) -> Tensor:
    """The stored weight; a parametrization computes it."""
    return cast("Tensor", module.weight)


def _width(module: nn.Module) -> int:
    rows, columns = _weight(module).shape
    return rows if isinstance(module, nn.Linear) else columns


def _fused_columns(model: nn.Module, name: str, module: nn.Module) -> dict[str, Tensor] | None:
    """Columns of queries, keys and values in a fused projection's output; none for any other module.

    GPT-2's `c_attn` holds them one after the other, GPT-NeoX's `query_key_value` head by head, `qkv_proj` one after the other with as
    many heads of keys and values as the model's configuration says.
    """
    leaf, width = name.rsplit(".", 1)[-1], _width(module)
    config: Any = getattr(model, "config", None)
    columns = torch.arange(width, device=_weight(module).device)
    if leaf == "c_attn" and width % 3 == 0:
        parts = columns.chunk(3)
    elif leaf == "query_key_value" and getattr(config, "model_type", None) == "gpt_neox":
        parts = [part.flatten() for part in columns.view(config.num_attention_heads, 3, -1).unbind(1)]
    elif leaf == "qkv_proj" and hasattr(config, "num_key_value_heads"):
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        size = width // (heads + 2 * shared)
        parts = columns.split([heads * size, shared * size, shared * size])
    else:
        return None
    return dict(zip(PARTS, parts, strict=True))


def _part_pattern(pattern: str) -> tuple[str, str | None]:
    """A pattern's part before a trailing [..], and what of it matches `PARTS`: one of the letters, or any for [*]."""
    base, bracket, letters = pattern.rpartition("[")
    if not bracket or not letters.endswith("]") or not base or base.endswith("."):
        return pattern, None
    return base, "*" if letters == "*]" else f"[{letters}"


def _require_own_weight(name: str, module: nn.Module, owners: Mapping[int, list[str]]) -> None:
    plain = next(kind for kind in _kinds() if isinstance(module, kind))
    if type(module).forward is not plain.forward:
        raise SiteError(f"site {name}: {type(module).__name__} has a forward of its own, not x @ W + bias; leave it out of sites")
    places = owners.get(id(module.weight), [])
    if not places:
        raise SiteError(f"site {name}: its weight is computed (a parametrization), not a parameter; leave it out of sites")
    if len(places) > 1:
        raise SiteError(f"site {name}: its weight is tied ({' = '.join(places)}), so replacing it would change both; leave it out of sites")


def _no_match(pattern: str, names: list[str]) -> str:
    if not names:
        return f"sites {pattern!r}: the model has no nn.Linear or Conv1D to decompose"
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    close = difflib.get_close_matches(pattern, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"sites {pattern!r} matches no weight matrix; {hint}there are: {listed}"


def given_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a module that maps one tensor is called with, by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def swapped_in(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """While active, each module runs the given function as its `forward`; restored whatever happens, Ctrl-C included.

    The function stands in for `module.forward` only, so the user's hooks keep firing.
    """
    before = [(module, module.__dict__.get("forward")) for module in forwards]
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        _restore(before)


def _restore(before: list[tuple[nn.Module, Callable[..., Tensor] | None]]) -> None:
    try:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
    except KeyboardInterrupt:
        _restore(before)
        raise


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """While active, the model is in evaluation mode and its parameters ask for no gradient; restored whatever happens."""
    training = [(module, module.training) for module in model.modules()]
    asks = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in asks:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, flag in asks:
            parameter.requires_grad_(flag)
