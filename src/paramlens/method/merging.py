"""Merging of dead subcomponents into the remainder Δ while training: the number of subcomponents follows from what is used.

A running maximum a ← max(a (1 - 1 / memory), max over the batch of g) tells which subcomponents are still active now and then. At a merge,
those with a ≤ `threshold` get u = v = 0, so that Δ = W - U V takes them over: the components still add up to W. Then C of a group of sites
of one shape, which share γ's products, shrinks to the largest number that one of its sites has left: U, V, γ and the optimizer's moments
lose the others. Where a site has fewer left, the rest of its subcomponents stay 0 and switched off.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paramlens.method.decomposition import Decomposition
from paramlens.method.importance.kind import GammaKind
from paramlens.method.importance.network import Importance
from paramlens.method.settings import Merge
from paramlens.method.sources import FreshSources


class Merging:
    """The running maxima of a run, and its merges. They change U, V, γ and the moments in place, as the same parameters of smaller size.

    recent: site → a of every subcomponent, [C]. sources: the adversary's, which lose the same subcomponents.
    """

    def __init__(
        self,
        settings: Merge,
        steps: int,
        decomposition: Decomposition,
        importance: Importance,
        optimizer: torch.optim.Optimizer,
        *,
        sources: FreshSources | None = None,
    ) -> None:
        self.settings, self.steps = settings, steps
        self.decomposition, self.importance, self.optimizer = decomposition, importance, optimizer
        self.sources = FreshSources() if sources is None else sources
        self.recent: dict[str, Tensor] = {name: U.new_zeros(U.shape[1]) for name, U in decomposition.U.items()}

    @torch.no_grad()
    def after_step(self, step: int, g: Mapping[str, Float[Tensor, "*batch C"]]) -> bool:
        """Take in the importances of `step` (from 0), and merge if it is time. True: C has shrunk."""
        done, every = step + 1, self.settings.every
        if every is None:
            return False
        decay = 1 - 1 / self.settings.memory
        for name, value in g.items():
            self.recent[name] = torch.maximum(self.recent[name] * decay, value.flatten(0, -2).amax(0))
        if done % every or not self.settings.start * self.steps <= done <= self.settings.end * self.steps:
            return False
        return self._merge()

    def left(self) -> dict[str, int]:
        """Site → number of subcomponents that have not been merged: those that write something."""
        return {name: int(V.any(1).sum()) for name, V in self.decomposition.V.items()}

    def _merge(self) -> bool:
        used = {name: recent > self.settings.threshold for name, recent in self.recent.items()}
        before = self.decomposition.C
        for group in self.importance.typed_groups:
            size = max(1, *(int(used[name].sum()) for name in group.names))
            orders = {name: _used_first(used[name])[:size] for name in group.names}
            off = {name: ~used[name][orders[name]] for name in group.names}
            self._take_factors(orders, off)
            self._take_gamma(group, [orders[name] for name in group.names])
            group.switch_off([off[name] for name in group.names])
            for name in group.names:
                self.sources.take(name, orders[name])
                self.recent[name] = self.recent[name][orders[name]].masked_fill(off[name], 0)
        return before != self.decomposition.C

    def _take_factors(self, orders: Mapping[str, Int[Tensor, "C"]], off: Mapping[str, Bool[Tensor, "C"]]) -> None:
        for name, order in orders.items():
            for parameter, axis in ((self.decomposition.U[name], 1), (self.decomposition.V[name], 0)):
                for tensor in self._with_moments(parameter):
                    tensor.data = tensor.index_select(axis, order).index_fill(axis, off[name].nonzero()[:, 0], 0)

    def _take_gamma(self, group: GammaKind, orders: Sequence[Int[Tensor, "C"]]) -> None:
        for name, parameter in group.named_parameters():
            if (axis := group.declared[name].C_axis) is not None:
                for tensor in self._with_moments(parameter):
                    tensor.data = torch.stack([of_site.index_select(axis, order) for of_site, order in zip(tensor, orders, strict=True)])

    def _with_moments(self, parameter: Tensor) -> list[Tensor]:
        """The parameter without gradient, and the optimizer's tensors of its shape."""
        parameter.grad = None
        state = self.optimizer.state.get(parameter, {})
        return [parameter, *(value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape)]


def _used_first(used: Bool[Tensor, "C"]) -> Int[Tensor, "C"]:
    """Indices of the used subcomponents in their order, then of all others."""
    return torch.cat([used.nonzero()[:, 0], (~used).nonzero()[:, 0]])


@torch.no_grad()
def resize(decomposition: Decomposition, importance: Importance, C: Mapping[str, int]) -> None:
    """Give every site C subcomponents, with new values of 0, where it has another number: for values that are then loaded."""
    for name, count in C.items():
        U, V = decomposition.U[name], decomposition.V[name]
        if U.shape[1] != count:
            U.data, V.data = U.new_zeros(U.shape[0], count), V.new_zeros(count, V.shape[1])
    for group in importance.typed_groups:
        count = C[group.names[0]]
        for name, parameter in group.named_parameters():
            shape = (len(group.names), *group.declared[name].sizes(count))
            if parameter.shape != shape:
                parameter.data = parameter.new_zeros(shape)
