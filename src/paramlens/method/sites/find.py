"""The sites of a model, chosen by patterns or names, with a check that each can be decomposed."""

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from paramlens.errors import SiteError
from paramlens.method.sites import embedding, experts, linear, parameter
from paramlens.method.sites.fused import PARTS
from paramlens.method.sites.site import Offer, Site

_KINDS = (linear.offers, embedding.offers, experts.offers, parameter.offers)
"""For each kind of site, the function that lists a module's sites. If two kinds list a tensor, it belongs to the first."""


def find_sites(model: nn.Module, patterns: Sequence[str]) -> tuple[Site, ...]:
    """The sites whose name matches any of `patterns` (`*`, `?`, `[..]`) and no pattern that begins with `!`, in the model's order.

    If a tensor holds several matrices, a suffix selects some: `...c_attn[q]`, `[k]` or `[v]` of a fused projection, `[qv]` two of them,
    `...W_Q[3]` a head, `...down_proj[*]` all experts. A pattern that equals a site's name selects only that site. Other patterns select
    modules that are x @ W + bias; if none matches, other weights; if none of those matches, embeddings. A pattern with `!` excludes all
    its matches.
    Raises `SiteError` for a pattern without a match, for slices of a weight whose slices are not known, for a weight that the model
    uses in a second place (a tied weight), for one that is not used as x @ W + bias, and for a fused projection selected both whole and
    in slices.
    """
    offered = _offered(model)
    excluding = [pattern for pattern in patterns if pattern.startswith("!") and pattern not in offered]
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern not in excluding:
            chosen.update(_taken(pattern, offered))
    if len(excluding) == len(patterns):
        raise SiteError(f"sites {' '.join(patterns)}: nothing but exclusions; name what to take as well, as in '*' {excluding[0]!r}")
    for pattern in excluding:
        chosen.difference_update(_matching(pattern[1:], offered))
    if not chosen:
        raise SiteError(f"sites {' '.join(patterns)}: nothing is left after the exclusions")
    return _sites(model, chosen, offered)


def named_sites(model: nn.Module, names: Sequence[str]) -> tuple[Site, ...]:
    """The sites with exactly these names, in the model's order. Raises `SiteError` if the model lacks one, and as `find_sites` does."""
    offered = _offered(model)
    for name in names:
        if name not in offered:
            raise SiteError(_no_match(name, offered))
    return _sites(model, set(names), offered)


def _offered(model: nn.Module) -> dict[str, Offer]:
    """Name → offer, for every weight matrix of the model that can be a site, in the model's order."""
    offered: dict[str, Offer] = {}
    for name, module in model.named_modules():
        taken: dict[int, Tensor] = {}
        for kind in _KINDS:
            own = [(offer, offer.site.stored) for offer in kind(model, name, module)]
            own = [(offer, tensor) for offer, tensor in own if id(tensor) not in taken]
            taken |= {id(tensor): tensor for _, tensor in own}
            offered |= {offer.site.name: offer for offer, _ in own}
    return offered


def _taken(pattern: str, offered: Mapping[str, Offer]) -> list[str]:
    """The names that a pattern without `!` selects: its matches of the lowest rank."""
    matching = _matching(pattern, offered)
    lowest = min(offered[name].rank for name in matching)
    return [name for name in matching if offered[name].rank == lowest]


def _matching(pattern: str, offered: Mapping[str, Offer]) -> list[str]:
    """Names that a pattern matches; only itself if it is a name. Raises `SiteError` if there are none."""
    if pattern in offered:
        return [pattern]
    base, suffix = _suffix_pattern(pattern)
    matching = [name for name, offer in offered.items() if _matches(offer, pattern, base, suffix)]
    if matching:
        return matching
    whole = next((name for name, offer in offered.items() if offer.suffix is None and fnmatchcase(name, base)), None)
    if suffix is not None and whole is not None and any(fnmatchcase(each, suffix) for each in PARTS):
        raise SiteError(
            f"sites {pattern!r}: slices are not available of {whole}, as it is not known which of its columns are queries, keys and "
            f"values; give {base!r} for the whole weight"
        )
    raise SiteError(_no_match(pattern, offered))


def _matches(offer: Offer, pattern: str, base: str, suffix: str | None) -> bool:
    if suffix is not None and offer.suffix is not None and fnmatchcase(offer.whole, base):
        return offer.suffix == suffix[1:-1] if suffix[1:-1].isdecimal() else fnmatchcase(offer.suffix, suffix)
    if offer.suffix is None or offer.rank > 0:  # slices of a module replace the whole weight, so they need a suffix
        return fnmatchcase(offer.whole, pattern) or fnmatchcase(offer.site.name, pattern)
    return False


def _sites(model: nn.Module, chosen: set[str], offered: Mapping[str, Offer]) -> tuple[Site, ...]:
    owners: dict[object, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners.setdefault(_memory(weight), []).append(name)
    offers = [offer for name, offer in offered.items() if name in chosen]
    for offer in offers:
        _require_own_weight(offer.site, owners)
        if offer.site.columns is not None and offer.whole in chosen:
            raise SiteError(f"sites: {offer.whole} is taken whole and in slices; leave one of them out")
    return tuple(offer.site for offer in offers)


def _memory(parameter: Tensor) -> object:
    """A key that is equal for two names of the same weight: the object's id, or the address of its numbers."""
    return id(parameter) if parameter.is_meta or not parameter.numel() else (parameter.device, parameter.data_ptr())


def _suffix_pattern(pattern: str) -> tuple[str, str | None]:
    """A pattern split before a trailing [..]: the base, and a pattern for suffixes (`[qv]`, or `*` for [*]). None: no suffix."""
    base, bracket, letters = pattern.rpartition("[")
    if not bracket or not letters.endswith("]") or not base or base.endswith("."):
        return pattern, None
    return base, "*" if letters == "*]" else f"[{letters}"


def _require_own_weight(site: Site, owners: Mapping[object, list[str]]) -> None:
    weight, leave_out = site.stored, f"leave it out: add '!{site.name}' to sites"
    if not isinstance(weight, nn.Parameter):
        raise SiteError(f"site {site.name}: its weight is computed (a parametrization or a hook), not a parameter; {leave_out}")
    if not weight.is_floating_point() or weight.dim() not in (2, 3) or type(weight.data) is not Tensor:
        kind = f"{type(weight.data).__name__} of {str(weight.dtype).removeprefix('torch.')}, shape {tuple(weight.shape)}"
        raise SiteError(f"site {site.name}: its weight is not a plain matrix of floats ({kind}; quantised or sharded?); {leave_out}")
    places = owners[_memory(weight)]
    if len(places) > 1:
        raise SiteError(f"site {site.name}: its weight is tied ({' = '.join(places)}), so replacing it would change both; {leave_out}")
    if (reason := site.refusal()) is not None:
        raise SiteError(f"site {site.name}: {reason}; {leave_out}")


def _no_match(pattern: str, offered: Mapping[str, Offer]) -> str:
    if not offered:
        return f"sites {pattern!r}: the model has no nn.Linear, Conv1D, nn.Embedding or matrix of its own to decompose"
    names = sorted(offered, key=lambda name: offered[name].rank)
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    close = difflib.get_close_matches(pattern, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"sites {pattern!r} matches no weight matrix; {hint}there are: {listed}"
