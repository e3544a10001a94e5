"""Weights without a module of their own: parameters used in `einsum`, `matmul` or `linear`, and nn.MultiheadAttention's projections.

TransformerLens stores W_Q, W_K, W_V [head, d_model, d_head], W_O [head, d_head, d_model], W_in, W_out and W_U [d_in, d_out].
nn.MultiheadAttention stores `in_proj_weight` [3 d, d] for queries, keys and values, and uses its `out_proj` without calling it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paramlens.errors import SiteError
from paramlens.method.hooks import shadowed
from paramlens.method.sites.fused import PARTS
from paramlens.method.sites.site import Offer, Place, Product, Seen, Site, suffixed
from paramlens.method.sites.standin import Block, Holder, StandIn


class ParameterSite(Site):
    """A parameter of a module, or one matrix of it.

    index: index of the matrix in the parameter. Defaults to None: the whole parameter.
    transposed: whether the matrix is stored as [d_out, d_in], as for `F.linear`.
    """

    looked_up = False
    """Whether the input is ids, and the product is the rows of W with these ids."""

    def __init__(
        self,
        name: str,
        place: "ParameterPlace",
        parameter: str,
        *,
        index: int | slice | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(name, place)
        self.parameter, self._index, self._transposed = parameter, index, transposed

    def own(self, stored: Tensor) -> Tensor:
        """The site's entries [d_in, d_out] in a tensor of the parameter's shape."""
        own = stored if self._index is None else stored[self._index]
        return own.T if self._transposed else own

    @property
    def stored(self) -> Tensor:
        return dict(self.place.module.named_parameters(recurse=False))[self.parameter]  # also while a stand-in shadows it

    @property
    def W(self) -> Float[Tensor, "d_in d_out"]:
        return self.own(self.stored)

    @torch.no_grad()
    def write(self, W: Float[Tensor, "d_in d_out"]) -> None:
        self.W.copy_(W)


class ParameterPlace(Place, Holder):
    """A module in which stand-ins replace parameters during a run. It computes the sites' products for the stand-ins."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._watching: list[tuple[frozenset[Site], Seen]] = []
        self._products: dict[Site, Product] = {}
        self._known: dict[tuple[object, ...], Sequence[Block]] = {}

    @contextmanager
    def watched(self, sites: Sequence[Site], see: Seen) -> Iterator[None]:
        self._watching.append((frozenset(sites), see))
        try:
            with self.entered():
                yield
        finally:
            self._watching.pop()

    @contextmanager
    def replaced(self, products: Mapping[Site, Product]) -> Iterator[None]:
        before, self._products = self._products, dict(products)
        try:
            with self.entered():
                yield
        finally:
            self._products = before

    def replaced_weights(self, sites: Sequence[Site]) -> tuple[Tensor, ...]:
        return tuple(dict.fromkeys(site.stored for site in sites))

    def entered(self) -> AbstractContextManager[None]:
        """A context in which the module computes with stand-ins."""
        return self.stand_ins()

    def stand_ins(self) -> AbstractContextManager[None]:
        stored = {site.parameter: site.stored for site in self._sites()}
        return shadowed({(self.module, name): StandIn.of(tensor.detach(), self, name) for name, tensor in stored.items()})

    def _sites(self) -> list[ParameterSite]:
        watched = [site for sites, _ in self._watching for site in sites]
        return [site for site in dict.fromkeys([*watched, *self._products]) if isinstance(site, ParameterSite)]

    @property
    def only_watches(self) -> bool:
        return not self._products

    def computed(self, block: Block, x: Tensor) -> Tensor | None:
        for sites, see in self._watching:
            if block.site in sites:
                see(block.site, x)
        product = self._products.get(block.site)
        if product is None:
            return None
        given = product.aligned(x)
        y = product.compute(given, lambda start, end: block.site.product(given[start:end]))
        return y.reshape(*x.shape[:-1], -1)

    def blocks(self, stand_in: StandIn, arranged: Callable[[Tensor], Tensor], key: str, *, lookup: bool = False) -> Sequence[Block]:
        sites = [site for site in self._sites() if site.parameter == stand_in.parameter]
        known = (stand_in.key, key, *sites)
        if known not in self._known:
            stored = sites[0].stored
            addresses = torch.arange(stored.numel()).view(stored.shape)
            w = arranged(stand_in.replay(addresses))
            places = torch.full((stored.numel(),), -1)
            places[w.flatten()] = torch.arange(w.numel())
            if (places >= 0).sum() != w.numel():
                raise self.refusal(stand_in, "a product in which some of its numbers occur twice")
            found = [_block(site, w.shape, places[site.own(addresses)], lookup=lookup) for site in sites]
            self._known[known] = [block.to(stored.device) for block in found if block is not None]
        return self._known[known]

    def refusal(self, stand_in: StandIn, what: str) -> SiteError:
        names = [site.name for site in self._sites() if site.parameter == stand_in.parameter]
        return SiteError(f"site {names[0]}: the model uses it in {what}. Leave it out: add '!{names[0]}' to sites")


def _block(site: ParameterSite, shape: torch.Size, places: Tensor, *, lookup: bool) -> Block | None:
    """The block of a site in a weight w [b, i, o]. places: index in w of each entry of its W [d_in, d_out]. None: W is not in w."""
    if (places < 0).all():
        return None
    b, i, o = places // (shape[1] * shape[2]), places // shape[2] % shape[1], places % shape[2]
    in_rows = (places >= 0).all() and (b == b[0, 0]).all() and (i == i[:, :1]).all() and (o == o[:1]).all()
    if not in_rows or lookup != site.looked_up:
        how = "rows looked up by number" if lookup else "a product that is not x @ W, such as that of its transpose or of a part of it"
        raise SiteError(f"site {site.name}: the model uses it in {how}. Leave it out: add '!{site.name}' to sites")
    rows, columns = i[:, 0], o[0]
    return Block(site, int(b[0, 0]), _unless_all(rows, shape[1]), _unless_all(columns, shape[2]))


def _unless_all(indices: Tensor, size: int) -> Tensor | None:
    return None if torch.equal(indices, torch.arange(size)) else indices


def offers(_model: nn.Module, name: str, module: nn.Module) -> Iterator[Offer]:
    """The matrices among the module's own parameters, for nn.MultiheadAttention and modules that are not torch's.

    A parameter with three axes holds one matrix for each index of the first. A matrix is [d_in, d_out], or, if the parameter's name ends
    in `weight` or `proj`, [d_out, d_in] as for `F.linear`.
    """
    place = ParameterPlace(module)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        yield Offer(ParameterSite(name, place, "weight", transposed=True), name)
    elif isinstance(module, nn.MultiheadAttention):
        yield from _attention_offers(name, module, place)
    elif not type(module).__module__.startswith("torch.nn."):
        yield from matrix_offers(name, module, place, lambda leaf: leaf.endswith(("weight", "proj")))


def matrix_offers(name: str, module: nn.Module, place: ParameterPlace, transposed: Callable[[str], bool]) -> Iterator[Offer]:
    """The parameters of `module` that are matrices or stacks of matrices."""
    for leaf, parameter in module.named_parameters(recurse=False):
        whole = named(name, leaf)
        if leaf.startswith("b_") or leaf.endswith(("bias", "W_E", "W_pos")):
            continue  # biases are added, tables are looked up
        if parameter.dim() == 2:
            yield Offer(ParameterSite(whole, place, leaf, transposed=transposed(leaf)), whole, rank=1)
        elif parameter.dim() == 3:
            for i in range(len(parameter)):
                yield _offer(place, whole, leaf, str(i), i, transposed=transposed(leaf))


def _attention_offers(name: str, module: nn.MultiheadAttention, place: ParameterPlace) -> Iterator[Offer]:
    for i, part in enumerate(PARTS):
        if module.in_proj_weight is None:
            leaf = f"{part}_proj_weight"
            yield Offer(ParameterSite(named(name, leaf), place, leaf, transposed=True), named(name, leaf), rank=1)
        else:
            rows = slice(i * module.embed_dim, (i + 1) * module.embed_dim)
            yield _offer(place, named(name, "in_proj_weight"), "in_proj_weight", part, rows, transposed=True)


def _offer(place: ParameterPlace, whole: str, leaf: str, suffix: str, index: int | slice, *, transposed: bool) -> Offer:
    """The offer of one of several matrices in a parameter."""
    return Offer(ParameterSite(suffixed(whole, suffix), place, leaf, index=index, transposed=transposed), whole, suffix, rank=1)


def named(module: str, leaf: str) -> str:
    """The full name of a module's parameter."""
    return f"{module}.{leaf}" if module else leaf
