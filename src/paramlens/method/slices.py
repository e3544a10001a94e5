"""A check that the slices of a fused projection are its queries, keys and values.

The output of attention at a position depends on the query at that position only, but on keys and values at other positions too. If all
values are zero, it depends on no query and no key. Both are measured by gradients of the attention module's output with respect to the
projection's output, so the check relies on no name, shape or number of heads. Without softmax, keys and values behave alike; then only
the class of the attention tells them apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from paramlens.errors import SiteError
from paramlens.method.batch import Inputs, map_tensors, tensors_of
from paramlens.method.decomposition import Decomposition, call
from paramlens.method.hooks import given_input, hooked, swapped_in
from paramlens.method.sites import named_sites
from paramlens.method.sites.fused import PARTS


@dataclass(frozen=True)
class _Reach:
    """For each column, whether attention's output at the last position depends on it at that position, and at earlier positions."""

    own: Bool[Tensor, "column"]
    others: Bool[Tensor, "column"]


def require_slices(decomposition: Decomposition, inputs: Inputs) -> None:
    """Raise `SiteError` if the slices of a fused projection are not its queries, keys and values."""
    names = {site.name.rpartition("[")[0] for site in decomposition.sites if site.columns is not None}
    if not names:
        return
    columns = {name: _columns(decomposition.model, name) for name in names}
    plain = _reaches(decomposition.model, inputs, columns, zeroed=False)
    valueless = _reaches(decomposition.model, inputs, columns, zeroed=True)
    for name, parts in columns.items():
        a, b = plain.get(name), valueless.get(name)
        if a is None or b is None or not _holds(parts, a, b):
            raise SiteError(
                f"site {name}: measured on the first batch, its slices are not the queries, keys and values of its attention, or the "
                f"batch has only one position, which does not show it; give {name!r} for the whole weight"
            )


def _columns(model: nn.Module, name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part, site in zip(PARTS, named_sites(model, [f"{name}[{part}]" for part in PARTS]), strict=True):
        assert site.columns is not None
        found[part] = site.columns
    return found


def _holds(parts: dict[str, Tensor], plain: _Reach, valueless: _Reach) -> bool:
    """Whether no column contradicts its slice, and at least one column confirms each slice. Columns without effect are ignored."""
    q, k, v = (parts[part] for part in PARTS)
    query, spread = plain.own & ~plain.others, plain.others
    value = valueless.own | valueless.others
    contradicted = spread[q].any() | query[k].any() | query[v].any() | value[q].any() | value[k].any() | (spread & ~value)[v].any()
    confirmed = query[q].any() & spread[k].any() & value[v].any()
    return bool(confirmed & ~contradicted)


def _reaches(model: nn.Module, inputs: Inputs, columns: dict[str, dict[str, Tensor]], *, zeroed: bool) -> dict[str, _Reach]:
    """Projection → the columns on which its attention module's output at the last position depends; zeroed: all values are zero.

    Gradients stop at the output of each attention module, so that one forward pass measures all of them.
    """
    outputs, returned = dict[str, Tensor](), dict[str, Tensor]()

    def fused(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                y = original(given_input(args, kwargs)).clone()
                if zeroed:
                    y[..., columns[name]["v"]] = 0
            outputs[name] = y.requires_grad_()
            return y.clone()

        return forward

    def cut(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: object, _kwargs: object, output: Any) -> Any:
            first = next(iter(tensors_of(output)), None)
            if first is not None:
                returned[name] = first
            return map_tensors(Tensor.detach, output) if isinstance(output, Tensor) or type(output) in (tuple, list) else None

        return hook

    modules = {name: model.get_submodule(name) for name in columns}
    owners = [(model.get_submodule(name.rpartition(".")[0]), cut(name)) for name in columns]
    forwards = {module: fused(name, module.forward) for name, module in modules.items()}
    with torch.enable_grad(), hooked(owners), swapped_in(forwards):
        call(model, inputs)
        return {name: found for name in columns if (found := _reach(returned.get(name), outputs.get(name))) is not None}


def _reach(returned: Tensor | None, y: Tensor | None) -> _Reach | None:
    """Columns with a gradient from the output at the last position; None if the tensors have no axis of positions."""
    if returned is None or y is None or y.dim() != 3 or y.shape[1] < 2 or returned.shape[:2] != y.shape[:2] or not returned.requires_grad:
        return None
    last = returned[:, -1]
    weights = torch.arange(last.numel(), device=last.device).add(1).to(last.dtype).cos().view(last.shape)
    [gradient] = torch.autograd.grad((last * weights).sum(), [y])
    alive = gradient != 0
    return _Reach(alive[:, -1].any(0), alive[:, :-1].flatten(0, 1).any(0))
