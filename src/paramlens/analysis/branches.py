"""What the attention and the MLP of every block add to the residual stream. It is measured, as some modules add the stream themselves.

A module's own contribution is its output, or its output minus one of its arguments. Every way to set both contributions of a block to
zero is tried; the right one is the first with which the block returns its input, possibly passed through norms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paramlens.analysis.norms import factor, norm_of
from paramlens.errors import BatchError, ConfigError
from paramlens.method.batch import Inputs
from paramlens.method.decomposition import call
from paramlens.method.hooks import hooked

Kind = Literal["mlp", "attention"]

_NAMES: dict[Kind, tuple[str, ...]] = {
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2"),
    "attention": ("attn", "attention", "self_attn", "self_attention"),
}
"""Names of candidate modules. A measurement decides whether a candidate is what its name says."""

Argument = int | str
"""Index or keyword of a module's argument."""


_Passed = tuple[nn.Module, Tensor, Tensor]
"""(module without children, its input, its output)."""


@dataclass(frozen=True)
class Branch:
    """A module whose own contribution a block adds to the residual stream.

    added: the argument, the residual stream, that the module adds to its contribution. None: it returns the contribution alone.
    """

    module: nn.Module
    added: Argument | None = None

    def rest(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """What the module would return if its own contribution were zero."""
        if self.added is None:
            return torch.zeros_like(hidden_of(output))
        return (args[self.added] if isinstance(self.added, int) else kwargs[self.added]).clone()


@torch.no_grad()
def find_branches(model: nn.Module, blocks: Sequence[nn.Module], inputs: Inputs) -> dict[Kind, list[Branch]]:
    """The attention and the MLP of every block. Raises `ConfigError` for a block where they are not found or that adds anything else."""
    modules: dict[Kind, list[nn.Module]] = {kind: [_named(block, kind) for block in blocks] for kind in ("mlp", "attention")}
    arguments: dict[nn.Module, list[Argument]] = {}
    given: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        named = {**dict(enumerate(args)), **kwargs}
        arguments[module] = [name for name, value in named.items() if _like(value, hidden_of(output))]

    def enter(block: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        given[block] = args[0].clone()

    with hooked([(module, keep) for found in modules.values() for module in found], [(block, enter) for block in blocks]):
        call(model, inputs)
    found: dict[int, list[Branch]] = {}
    named = [[None, *dict.fromkeys(name for each in modules[kind] for name in arguments.get(each, []))] for kind in modules]
    for through_norms, way in product((False, True), product(*named)):
        tried = {
            i: [Branch(modules[kind][i], added) for kind, added in zip(modules, way, strict=True)]
            for i in range(len(blocks))
            if i not in found
        }
        fits = {i: pair for i, pair in tried.items() if all(each.added is None or each.added in arguments[each.module] for each in pair)}
        if fits:
            ends = _silenced(model, [blocks[i] for i in fits], given, [each for pair in fits.values() for each in pair], inputs)
            found |= {i: pair for i, pair in fits.items() if _reaches(given[blocks[i]], *ends[blocks[i]], through_norms=through_norms)}
    for i, block in enumerate(blocks):
        if i not in found:
            raise ConfigError(
                f"trace: block {i} ({type(block).__name__}) does not return its input when its attention and its MLP are set to zero, so "
                "what they add to the residual stream cannot be measured; decompose and circuit work without that"
            )
    return {kind: [found[i][place] for i in range(len(blocks))] for place, kind in enumerate(modules)}


def _named(block: nn.Module, kind: Kind) -> nn.Module:
    found = next((child for name in _NAMES[kind] for own, child in block.named_children() if own == name), None)
    if found is None:
        names = ", ".join(_NAMES[kind])
        raise ConfigError(
            f"trace: {type(block).__name__} has no {kind} that could be found (a child module named {names}), so there is no map of it"
        )
    return found


def _like(value: Any, hidden: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == hidden.shape and value.is_floating_point()


def _silenced(
    model: nn.Module, blocks: Sequence[nn.Module], given: Mapping[nn.Module, Tensor], branches: Sequence[Branch], inputs: Inputs
) -> dict[nn.Module, tuple[Tensor, list[_Passed]]]:
    """The output of each block on its usual input with all branches at zero, and (module, input, output) of its childless modules."""
    owner = {module: block for block in blocks for module in block.modules() if not any(True for _ in module.children())}
    returned: dict[nn.Module, Tensor] = {}
    passed: dict[nn.Module, list[_Passed]] = {block: [] for block in blocks}

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (given[block].clone(), *args[1:]), kwargs

    def keep(module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        if args and isinstance(output, Tensor) and _like(args[0], output):
            passed[owner[module]].append((module, args[0].clone(), output.clone()))

    def leave(block: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        returned[block] = hidden_of(output).clone()

    hooks = [(branch.module, partial(without, branch)) for branch in branches]
    hooks += [*((leaf, keep) for leaf in owner), *((block, leave) for block in blocks)]
    with hooked(hooks, [(block, enter) for block in blocks]):
        call(model, inputs)
    return {block: (returned[block], passed[block]) for block in blocks}


def _reaches(start: Tensor, end: Tensor, passed: Sequence[_Passed], *, through_norms: bool) -> bool:
    """True if `end` is a multiple of `start`, or of `start` after one or more norms."""
    known = [start]
    for module, given, output in passed if through_norms else ():
        if any(_same(given, each) for each in known) and norm_of(module, given) is not None:
            known.append(output)
    return any(factor(end, each) is not None for each in known)  # some blocks multiply the whole stream by a number


def _same(values: Tensor, others: Tensor) -> bool:
    return values.shape == others.shape and bool((values - others).norm() <= 1e-3 * others.norm())


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a module's output: the output itself or its first element. Raises `BatchError` if it is not a tensor."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise BatchError(f"trace: a module returned {type(output).__name__}, no hidden state")
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The same output with the hidden state replaced."""
    return type(output)((hidden, *output[1:])) if isinstance(output, tuple | list) else hidden


def without(branch: Branch, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """The hook that sets a branch's contribution to zero."""
    return with_hidden(output, branch.rest(args, kwargs, output))
