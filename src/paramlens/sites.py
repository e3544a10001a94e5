"""Sites: the weight matrices of a model that are decomposed, each as W [d_in, d_out] in `y = x @ W + bias`.

The orientation is decided here and nowhere else: `nn.Linear` stores the transpose of W.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from jaxtyping import Float
from torch import Tensor, nn

from paramlens.errors import SiteError


@dataclass(frozen=True)
class Site:
    """One decomposed weight matrix; `name` is its module's path in the model."""

    name: str
    module: nn.Linear

    @property
    def W(self) -> Float[Tensor, "d_in d_out"]:
        """The target's weight, as used in `x @ W`."""
        return self.module.weight.T

    @property
    def bias(self) -> Float[Tensor, "d_out"] | None:
        return self.module.bias

    @property
    def d_in(self) -> int:
        return self.module.in_features

    @property
    def d_out(self) -> int:
        return self.module.out_features


def find_sites(model: nn.Module, patterns: Sequence[str]) -> tuple[Site, ...]:
    """The sites whose module path matches any of `patterns` (`*`, `?`, `[..]`), in the model's own order.

    Raises `SiteError` for a pattern that matches none, and for a weight that the model uses in a second place (a tied weight).
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise SiteError(_no_match(pattern, list(found)))
    chosen = {name: module for name, module in found.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in chosen.items():
        if type(module).forward is not nn.Linear.forward:
            raise SiteError(f"site {name}: {type(module).__name__} has a forward of its own, not x @ W + bias; leave it out of sites")
        places = owners.get(id(module.weight), [])
        if not places:
            raise SiteError(f"site {name}: its weight is computed (a parametrization), not a parameter; leave it out of sites")
        if len(places) > 1:
            raise SiteError(
                f"site {name}: its weight is tied ({' = '.join(places)}), so replacing it would change both; leave it out of sites"
            )
    return tuple(Site(name, module) for name, module in chosen.items())


def _no_match(pattern: str, names: list[str]) -> str:
    if not names:
        return f"sites {pattern!r}: the model has no nn.Linear to decompose"
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    close = difflib.get_close_matches(pattern, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"sites {pattern!r} matches no weight matrix; {hint}there are: {listed}"


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
