"""What every kind of site offers: its weight, its input, and its place in the model, where a run sees and replaces its product."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from paramlens.method.masks import Replacement, masked_linear

TargetRows = Callable[[int, int], Tensor]
"""What the target's own weight makes of the input's rows from one to another."""

Seen = Callable[["Site", Tensor], None]
"""Is called with a site and what it is given, x, once for each time that the model computes its product."""


@dataclass(frozen=True)
class Product:
    """What a site computes in place of `x @ W + bias`.

    compute: of the input x and of what the target makes of its rows.
    leading: axes of x before the last that `compute` expects; defaults to None: as the model gives them.
    copies: read a copy of the input, because the model writes into it before gradients are taken.
    """

    compute: Callable[[Tensor, TargetRows], Tensor]
    leading: tuple[int, ...] | None = None
    copies: bool = False

    def aligned(self, given: Tensor) -> Tensor:
        x = given.clone() if self.copies else given
        return x if self.leading is None else aligned(x, self.leading)


class Site(ABC):
    """One decomposed weight matrix W [d_in, d_out], used by the model as `x @ W + bias`.

    name: as the model has it, `blocks.0.mlp.W_in`, with a suffix where one tensor holds several matrices: [q], or the index [3].
    place: the place in the model at which the product is computed.
    """

    def __init__(self, name: str, place: "Place") -> None:
        self.name, self.place = name, place

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """The tensor of the model that holds the weight, a parameter unless it is computed."""

    @property
    @abstractmethod
    def W(self) -> Float[Tensor, "d_in d_out"]:
        """The target's weight, as used in `x @ W`."""

    @abstractmethod
    def write(self, W: Float[Tensor, "d_in d_out"]) -> None:
        """Set the model's weight to `W`, in place."""

    @property
    def d_in(self) -> int:
        return self.W.shape[0]

    @property
    def d_out(self) -> int:
        return self.W.shape[1]

    @property
    def bias(self) -> Float[Tensor, "d_out"] | None:
        """What the product's place adds to `x @ W`. Defaults to None: nothing, or the model adds it elsewhere."""
        return None

    @property
    def module(self) -> nn.Module | None:
        """The module whose input is x and whose output is `x @ W + bias`; None where no module is just that."""
        return None

    @property
    def columns(self) -> Tensor | None:
        """The columns of the module's output that belong to the site; None: all."""
        return None

    @property
    def d_seen(self) -> int:
        """Width of what γ sees of the input."""
        return self.d_in

    def seen(self, x: Tensor) -> Float[Tensor, "*batch d_seen"]:
        """What γ sees of the input: the input itself."""
        return x

    def vectors(self, x: Tensor) -> Float[Tensor, "*batch d_in"]:
        """The input as vectors."""
        return x

    def read(self, x: Tensor, U: Float[Tensor, "d_in C"]) -> Float[Tensor, "*batch C"]:
        """X @ U."""
        return x @ U

    def product(self, x: Tensor) -> Float[Tensor, "*batch d_out"]:
        """X @ W, without bias and without gradient to W."""
        return self.read(x, self.W.detach())

    def masked(
        self, x: Tensor, U: Float[Tensor, "d_in C"], V: Float[Tensor, "C d_out"], replacements: Sequence[Replacement]
    ) -> Float[Tensor, "*batch d_out"]:
        """`((x @ U) * r) @ V + bias`, r being the masks of `replacements`, one after the other along the first axis."""
        return masked_linear(x, U, V, replacements, self.bias)

    def refusal(self) -> str | None:
        """Why the weight cannot be decomposed, measured on the site alone; None if nothing speaks against it."""
        return None


class Place(ABC):
    """A place in the model at which products of one or more sites are computed.

    module: the module that holds the weight.
    """

    module: nn.Module

    @abstractmethod
    def watched(self, sites: Sequence[Site], see: Seen) -> AbstractContextManager[None]:
        """While active, `see` is called with what each of `sites` is given; the model computes what it did, to the bit."""

    @abstractmethod
    def replaced(self, products: Mapping[Site, Product]) -> AbstractContextManager[None]:
        """While active, the sites compute `products` in place of their own; restored whatever happens."""

    @abstractmethod
    def replaced_weights(self, sites: Sequence[Site]) -> tuple[Tensor, ...]:
        """Tensors of the model that nothing uses while all of `sites` are replaced, unless they are used elsewhere as well."""


@contextmanager
def watched(sites: Sequence[Site], see: Seen) -> Iterator[None]:
    """While active, `see` is called with every site and what it is given, each time that the model computes its product."""
    with ExitStack() as stack:
        for place, own in by_place(sites).items():
            stack.enter_context(place.watched(own, see))
        yield


@contextmanager
def replaced(products: Mapping[Site, Product]) -> Iterator[None]:
    """While active, sites compute `products` in place of their own product; restored whatever happens, Ctrl-C included."""
    with ExitStack() as stack:
        for place, own in by_place(list(products)).items():
            stack.enter_context(place.replaced({site: products[site] for site in own}))
        yield


def by_place(sites: Sequence[Site]) -> dict[Place, list[Site]]:
    found: dict[Place, list[Site]] = {}
    for site in sites:
        found.setdefault(site.place, []).append(site)
    return found


def aligned(x: Tensor, leading: Sequence[int]) -> Tensor:
    """`x` with the leading axes `leading`, if its own are those in a row, or those and further ones of one entry."""
    own = x.shape[:-1]
    same = [size for size in own if size != 1] == [size for size in leading if size != 1]
    flat = len(own) == 1 and own[0] == math.prod(leading)
    return x.reshape(*leading, x.shape[-1]) if tuple(own) != tuple(leading) and (same or flat) else x


@dataclass(frozen=True)
class Offer:
    """A site that a model has, and what patterns are compared with.

    whole: the name without a suffix; suffix: [q] or [3] without its brackets, None where there is none.
    rank: a pattern takes its matches of the lowest rank alone: 0 for modules x @ W + bias, 1 for other weights, 2 for embeddings.
    """

    site: Site
    whole: str
    suffix: str | None = None
    rank: int = 0


def suffixed(whole: str, suffix: str) -> str:
    """The name of one of several matrices in one tensor."""
    return f"{whole}[{suffix}]"
