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
from paramlens.method.fused import PARTS, fused_columns
from paramlens.method.modes import buffers_kept, default_modes, one_thread


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


_Chosen = tuple[str, str | None]
"""A module's path and the slice of it that is taken; none: its whole weight."""


def find_sites(model: nn.Module, patterns: Sequence[str]) -> tuple[Site, ...]:
    """The sites whose name matches any of `patterns` (`*`, `?`, `[..]`) and none of those that begin with `!`, in the model's own order.

    A module path names a whole weight. Of a fused projection, `...c_attn[q]`, `[k]` and `[v]` name slices, `...c_attn[qv]` two of them.
    A pattern that is a site's very name means that site alone.
    Raises `SiteError` for a pattern that matches none, for slices of a weight of which they are not known, for a weight that the model
    uses in a second place (a tied weight), for one that is not used as x @ W + bias, and for a fused projection that is taken both whole
    and in slices.
    """
    offered = _offered(model)
    excluding = [pattern for pattern in patterns if pattern.startswith("!") and pattern not in offered]
    chosen: set[_Chosen] = set()
    for pattern in patterns:
        if pattern not in excluding:
            chosen.update(_matching(pattern, offered))
    if len(excluding) == len(patterns):
        raise SiteError(f"sites {' '.join(patterns)}: nothing but exclusions; name what to take as well, as in '*' {excluding[0]!r}")
    for pattern in excluding:
        chosen.difference_update(_matching(pattern[1:], offered))
    if not chosen:
        raise SiteError(f"sites {' '.join(patterns)}: nothing is left after the exclusions")
    return _sites(model, chosen, offered)


def named_sites(model: nn.Module, names: Sequence[str]) -> tuple[Site, ...]:
    """The sites of exactly these names, in the model's own order. Raises `SiteError` if the model lacks one, and as `find_sites` does."""
    offered = _offered(model)
    for name in names:
        if name not in offered:
            raise SiteError(_no_match(name, list(offered)))
    return _sites(model, {offered[name] for name in names}, offered)


def _offered(model: nn.Module) -> dict[str, _Chosen]:
    """Name → what it stands for, of every weight matrix and every slice of one, in the model's order."""
    offered: dict[str, _Chosen] = {}
    for name, module in _found(model).items():
        offered[name] = (name, None)
        if _columns(model, name, module) is not None:
            offered |= {f"{name}[{part}]": (name, part) for part in PARTS}
    return offered


def _found(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _kinds())}


def _columns(model: nn.Module, name: str, module: nn.Module) -> dict[str, Tensor] | None:
    stored = _weight(module)
    if stored.dim() != 2:  # packed or quantised
        return None
    d_out, d_in = stored.shape if isinstance(module, nn.Linear) else stored.T.shape
    return fused_columns(model, name, d_in=d_in, width=d_out)


def _matching(pattern: str, offered: Mapping[str, _Chosen]) -> list[_Chosen]:
    """What a pattern names; itself alone where it is a name. Raises `SiteError` if that is nothing."""
    if pattern in offered:
        return [offered[pattern]]
    wholes = [name for name, (_, part) in offered.items() if part is None]
    matching: list[_Chosen] = [(name, None) for name in wholes if fnmatchcase(name, pattern)]
    base, part = _part_pattern(pattern)
    if part is not None:
        slices = [each for each in offered.values() if each[1] is not None]
        matching += [each for each in slices if fnmatchcase(each[0], base) and fnmatchcase(str(each[1]), part)]
        whole = next((name for name in wholes if fnmatchcase(name, base)), None)
        if not matching and whole is not None and any(fnmatchcase(each, part) for each in PARTS):
            raise SiteError(
                f"sites {pattern!r}: slices are not available of {whole}, as it is not known which of its columns are queries, keys and "
                f"values; give {base!r} for the whole weight"
            )
    if not matching:
        raise SiteError(_no_match(pattern, list(offered)))
    return matching


def _sites(model: nn.Module, chosen: set[_Chosen], offered: Mapping[str, _Chosen]) -> tuple[Site, ...]:
    owners: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(_memory(parameter), []).append(name)
    found, sites = _found(model), list[Site]()
    for site_name, (name, part) in offered.items():
        if (name, part) not in chosen:
            continue
        module = found[name]
        _require_own_weight(name, module, owners)
        if part is None:
            if any((name, each) in chosen for each in PARTS):
                raise SiteError(f"sites: {name} is taken whole and in slices; leave one of them out")
            sites.append(Site(site_name, module))
        else:
            columns = _columns(model, name, module)
            assert columns is not None
            sites.append(Site(site_name, module, columns[part].to(_weight(module).device)))
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


def _memory(parameter: Tensor) -> object:
    """What two parameters share if they are one weight under two names: the object, or where its numbers begin."""
    return id(parameter) if parameter.is_meta or not parameter.numel() else (parameter.device, parameter.data_ptr())


def _part_pattern(pattern: str) -> tuple[str, str | None]:
    """A pattern's part before a trailing [..], and what of it matches `PARTS`: one of the letters, or any for [*]."""
    base, bracket, letters = pattern.rpartition("[")
    if not bracket or not letters.endswith("]") or not base or base.endswith("."):
        return pattern, None
    return base, "*" if letters == "*]" else f"[{letters}"


def _require_own_weight(name: str, module: nn.Module, owners: Mapping[object, list[str]]) -> None:
    weight, leave_out = _weight(module), f"leave it out: add '!{name}' to sites"
    if not isinstance(weight, nn.Parameter):
        raise SiteError(f"site {name}: its weight is computed (a parametrization or a hook), not a parameter; {leave_out}")
    if not weight.is_floating_point() or weight.dim() != 2 or type(weight.data) is not Tensor:
        kind = f"{type(weight.data).__name__} of {str(weight.dtype).removeprefix('torch.')}, shape {tuple(weight.shape)}"
        raise SiteError(f"site {name}: its weight is not a plain matrix of floats ({kind}; quantised or sharded?); {leave_out}")
    places = owners[_memory(weight)]
    if len(places) > 1:
        raise SiteError(f"site {name}: its weight is tied ({' = '.join(places)}), so replacing it would change both; {leave_out}")
    if not _is_product(module):
        raise SiteError(f"site {name}: {type(module).__name__} has a forward of its own, not x @ W + bias; {leave_out}")


@torch.no_grad()
def _is_product(module: nn.Module) -> bool:
    """Whether the module's forward is x @ W + bias: the library's own, or one that gives the same numbers, if there are weights."""
    plain = next(kind for kind in _kinds() if isinstance(module, kind))
    weight = _weight(module)
    if (type(module).forward is plain.forward and "forward" not in module.__dict__) or weight.is_meta:
        return True
    site = Site("", module)
    x = torch.arange(2 * 3 * site.d_in, dtype=torch.float64).cos().view(2, 3, -1).to(weight)
    expected = x @ site.W if site.bias is None else x @ site.W + site.bias
    try:
        given = module.forward(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    close = isinstance(given, Tensor) and given.shape == expected.shape and given.dtype == expected.dtype
    return close and bool((given - expected).abs().max() <= 1e-4 * expected.abs().max())


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
    """While active, the model is in evaluation mode, its parameters ask for no gradient, and torch is in its `default_modes`.

    Restored whatever happens, the model's buffers included: they are as they were, bit for bit. Raises `ConfigError` if another thread
    has the model at rest.
    """
    with one_thread(model):
        training = [(module, module.training) for module in model.modules()]
        asking = [parameter for parameter in model.parameters() if parameter.requires_grad and not parameter.is_inference()]
        try:
            with default_modes(), buffers_kept(model):
                model.eval()
                for parameter in asking:
                    parameter.requires_grad_(False)
                yield
        finally:
            for module, mode in training:
                module.training = mode
            for parameter in asking:
                parameter.requires_grad_(True)
