"""Experts whose weights are stacked in one tensor, as for Mixtral in transformers: every expert's matrix is a site.

A router sends each token to a few experts, and the choice depends on the input. To give each token its own mask, every expert runs on
every token while its sites are watched or replaced. Its output is multiplied by the router's weight, which is 0 for tokens of other
experts. The sums are the same; the cost is that of all experts.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paramlens.method.hooks import swapped_in
from paramlens.method.sites.parameter import ParameterPlace, matrix_offers
from paramlens.method.sites.site import Offer


class ExpertsPlace(ParameterPlace):
    """A module `experts(hidden_states, top_k_index, top_k_weights)` of transformers; the forward of its class runs experts one by one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._inside = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        if self._inside:  # stand-ins are made at each call, for all sites watched or replaced then
            yield
            return
        original, one_by_one = self.module.forward, inspect.unwrap(type(self.module).forward)

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            tokens, count = len(hidden_states), len(_stacks(self.module)[0])
            every = torch.arange(count, device=hidden_states.device).expand(tokens, count)
            weights = top_k_weights.new_zeros(tokens, count).scatter_add(1, top_k_index, top_k_weights)
            with self.stand_ins():
                made = one_by_one(self.module, hidden_states, every, weights)
            return original(hidden_states, top_k_index, top_k_weights) if self.only_watches else made

        self._inside = True
        try:
            with swapped_in({self.module: forward}):
                yield
        finally:
            self._inside = False


def offers(_model: nn.Module, name: str, module: nn.Module) -> Iterator[Offer]:
    """Every expert's matrices, if the module has the forward and the stacked weights of transformers' experts."""
    taken = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)
    if taken == ["self", "hidden_states", "top_k_index", "top_k_weights"] and _stacks(module):
        as_used = bool(getattr(module, "is_transposed", False))
        yield from matrix_offers(name, module, ExpertsPlace(module), lambda _leaf: not as_used)


def _stacks(module: nn.Module) -> list[Tensor]:
    """The parameters that hold one matrix per expert."""
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
