"""The interface of every kind of site: its weight, its input, and its place in the model, where runs watch and replace its product."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from paramlens.method.masks import Replacement, masked_linear

TargetRows = Callable[[int, int], Tensor]
"""(start, end) → the target's output for rows start to end of the input."""

Seen = Callable[["Site", Tensor], None]
"""Called with a site and its input x, each time that the model computes its product."""


@dataclass(frozen=True)
class Product:
    """What a site computes instead of `x @ W + bias`.

    compute: (x, target's output by rows) → the new output.
    leading: axes of x before the last that `compute` expects. Defaults to None: as in the model.
    copies: whether to read a copy of the input, because the model overwrites it before the backward pass.
    """

    compute: Callable[[Tensor, TargetRows], Tensor]
    leading: tuple[int, ...] | None = None
    copies: bool = False

    def aligned(self, given: Tensor) -> Tensor:
        x = given.clone() if self.copies else given
        return x if self.leading is None else aligned(x, self.leading)


class Site(ABC):
    """One decomposed weight matrix W [d_in, d_out], used by the model as `x @ W + bias`.

    name: its name in the model, `blocks.0.mlp.W_in`, with a suffix if one tensor holds several matrices: [q], or the index [3].
    place: the place in the model where the product is computed.
    """

    def __init__(self, name: str, place: "Place") -> None:
        self.name, self.place = name, place

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """The model's tensor that holds the weight: a parameter, unless the model computes it."""

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
        """The bias that the product's place adds to `x @ W`. None: no bias, or the model adds it elsewhere."""
        return None

    @property
    def module(self) -> nn.Module | None:
        """The module with input x and output `x @ W + bias`. None: there is no such module."""
        return None

    @property
    def columns(self) -> Tensor | None:
        """The columns of the module's output that belong to the site. None: all."""
        return None

    @property
    def d_seen(self) -> int:
        """Width of γ's input."""
        return self.d_in

    def seen(self, x: Tensor) -> Float[Tensor, "*batch d_seen"]:
        """The input of γ, by default x itself."""
        return x

    def vectors(self, x: Tensor) -> Float[Tensor, "*batch d_in"]:
        """The input x as vectors."""
        return x

    def read(self, x: Tensor, U: Float[Tensor, "d_in C"]) -> Float[Tensor, "*batch C"]:
        """Inner activations x @ U."""
        return x @ U

    def product(self, x: Tensor) -> Float[Tensor, "*batch d_out"]:
        """The product x @ W, without bias and without gradient to W."""
        return self.read(x, self.W.detach())

    def masked(
        self, x: Tensor, U: Float[Tensor, "d_in C"], V: Float[Tensor, "C d_out"], replacements: Sequence[Replacement]
    ) -> Float[Tensor, "*batch d_out"]:
        """`((x @ U) * r) @ V + bias`, where r is the masks of `replacements` joined along the first axis."""
        return masked_linear(x, U, V, replacements, self.bias)

    def refusal(self) -> str | None:
        """Why the weight cannot be decomposed, tested on the site alone. None: it can."""
        return None


class Place(ABC):
    """A place in the model where the products of one or more sites are computed.

    module: the module that holds the weight.
    """

    module: nn.Module

    @abstractmethod
    def watched(self, sites: Sequence[Site], see: Seen) -> AbstractContextManager[None]:
        """While active, `see` is called with each of `sites` and its input; the model's results are unchanged, bit for bit."""

    @abstractmethod
    def replaced(self, products: Mapping[Site, Product]) -> AbstractContextManager[None]:
        """While active, the sites compute `products` instead of their own; restored at the end, even after an error."""

    @abstractmethod
    def replaced_weights(self, sites: Sequence[Site]) -> tuple[Tensor, ...]:
        """The model's tensors that are not used while all of `sites` are replaced, unless they are also used elsewhere."""


@contextmanager
def watched(sites: Sequence[Site], see: Seen) -> Iterator[None]:
    """While active, `see` is called with each site and its input, each time that the model computes its product."""
    with ExitStack() as stack:
        for place, own in by_place(sites).items():
            stack.enter_context(place.watched(own, see))
        yield


@contextmanager
def replaced(products: Mapping[Site, Product]) -> Iterator[None]:
    """While active, sites compute `products` instead of their own; restored at the end, even after an error or Ctrl-C."""
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
    """`x` reshaped to the leading axes `leading`, if its own are these flattened or differ only in axes of size 1; else unchanged."""
    own = x.shape[:-1]
    same = [size for size in own if size != 1] == [size for size in leading if size != 1]
    flat = len(own) == 1 and own[0] == math.prod(leading)
    return x.reshape(*leading, x.shape[-1]) if tuple(own) != tuple(leading) and (same or flat) else x


@dataclass(frozen=True)
class Offer:
    """A site that a model offers, with the names that patterns match.

    whole: the name without suffix.
    suffix: [q] or [3] without brackets. Defaults to None: no suffix.
    rank: a pattern selects only its matches of the lowest rank: 0 for modules x @ W + bias, 1 for other weights, 2 for embeddings.
    """

    site: Site
    whole: str
    suffix: str | None = None
    rank: int = 0


def suffixed(whole: str, suffix: str) -> str:
    """The name of one of several matrices in a tensor."""
    return f"{whole}[{suffix}]"
