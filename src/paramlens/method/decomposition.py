"""The decomposition: each site's weight as a sum of rank-1 subcomponents, and runs of the target with sites replaced by them.

    W ≈ U @ V = Σ_c outer(U[:, c], V[c])           (eq. 1; U reads, V writes; W is the transposed weight of nn.Linear)
    masked run at a site:  y = ((x @ U) * r) @ V + bias, and + m_Δ x (W - U V) if the remainder is a component (`products`)

| tensor            | shape             | range                |
|-------------------|-------------------|----------------------|
| W                 | [d_in, d_out]     |                      |
| U                 | [d_in, C]         |                      |
| V                 | [C, d_out]        |                      |
| x, a site's input | [batch, pos, d_in]|                      |
| inner activation  | [batch, pos, C]   |                      |
| mask r            | [batch, pos, C]   | [0, 1]               |
| logits            | [batch, pos, token] |                    |
| stacked logits    | [plan, batch, pos, token] |              |

A plan says which sites are replaced, and by which masks. Plans are stacked along the batch, so one forward pass runs them all. For
each plan a site computes only what that plan needs: the target's product or the masked one. If a site receives only a sequence's
last positions, its mask is cut to those positions. If a site receives a flattened input [batch * pos, d_in], it is
reshaped to [batch, pos, d_in]. A plan that changes nothing in the model's first blocks starts at the first block that it changes, with
the target's activations.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paramlens.display.result import Result
from paramlens.display.tables import Table, columns, row, site_cell, spread
from paramlens.errors import BatchError, SiteError
from paramlens.method.batch import Inputs, map_tensors, row_count, tensors_of
from paramlens.method.hooks import hooked, swapped_in
from paramlens.method.masks import Replacement
from paramlens.method.products import stacked_product
from paramlens.method.sites import Product, Site, TargetRows, aligned, replaced, watched
from paramlens.method.stored import StoredTensors

Plan = Mapping[str, Replacement]
"""Site name → replacement; all other sites use the target's weight."""


@dataclass(frozen=True)
class BlockRun:
    """The output of one block in the target's run.

    batched: for each tensor that the block gets besides the hidden state, whether its first axis is the batch.
    """

    output: Any
    batched: tuple[bool, ...]


@dataclass(frozen=True)
class TargetRun:
    """One run of the target: its logits [batch, pos, token] and each site's input [batch, pos, d_in], both without gradient.

    blocks: the outputs of the blocks that `Decomposition.find_blocks` found.
    seen: what γ reads at each site, [batch, pos, d_seen].
    """

    logits: Tensor
    inputs: dict[str, Tensor]
    blocks: tuple[BlockRun, ...] = ()
    seen: dict[str, Tensor] = field(default_factory=dict)


class Decomposition(Result, nn.Module):
    """U and V of every site, and masked runs of the target `model`. The target is never changed and is not a submodule."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        *,
        C: int | Mapping[str, int],
        dtype: torch.dtype = torch.float32,
        delta: bool = False,
    ) -> None:
        """C: number of subcomponents of every site, or of each by its name. delta: whether the remainder Δ = W - U V is a component."""
        super().__init__()
        self._target = (model,)  # in a tuple, so that the target's parameters are not registered here
        self.sites = tuple(sites)
        self.delta = delta
        self._blocks: tuple[nn.Module, ...] = ()
        self._home: dict[str, int] = {}  # site name → index of its block
        self._copied: set[Hashable] = set()  # blocks and places whose input or output the model overwrites later in a run
        counts = {site.name: C if isinstance(C, int) else C[site.name] for site in sites}
        how: dict[str, Any] = {"dtype": dtype, "device": self.sites[0].W.device}
        self._U = nn.ParameterList(torch.zeros(site.d_in, counts[site.name], **how) for site in sites)
        self._V = nn.ParameterList(torch.zeros(counts[site.name], site.d_out, **how) for site in sites)

    @property
    def model(self) -> nn.Module:
        return self._target[0]

    @property
    def device(self) -> torch.device:
        return self._U[0].device

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)

    @property
    def C(self) -> dict[str, int]:
        """Site name → number of its subcomponents."""
        return {name: U.shape[1] for name, U in self.U.items()}

    @property
    def U(self) -> dict[str, Float[Tensor, "d_in C"]]:
        """Site name → read directions."""
        return dict(zip(self.names, self._U, strict=True))

    @property
    def V(self) -> dict[str, Float[Tensor, "C d_out"]]:
        """Site name → write directions."""
        return dict(zip(self.names, self._V, strict=True))

    def site(self, name: str) -> Site:
        """The site called `name`."""
        return self.sites[self.names.index(name)]

    def inner(self, name: str, x: Tensor) -> Float[Tensor, "*batch C"]:
        """Inner activations x @ U at the site `name`, for its input x."""
        return self.site(name).read(x, self.U[name])

    def without(self, mask: Float[Tensor, "*batch C"]) -> Replacement:
        """The replacement that removes subcomponents from the target: mask 0 is off; Δ, if a component, is fully on."""
        return Replacement(mask, remainder=torch.ones_like(mask[..., 0]) if self.delta else None)

    def remainders(self) -> dict[str, float]:
        """Site name → ‖W - U V‖ / ‖W‖ (Frobenius norms): how much of the weight is in Δ."""
        with torch.no_grad():
            return {
                site.name: ((site.W - U @ V).norm() / site.W.norm()).item() for site, U, V in zip(self.sites, self._U, self._V, strict=True)
            }

    def seen(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Site name → what γ reads, given the sites' inputs."""
        return {name: self.site(name).seen(x) for name, x in inputs.items()}

    def summary(self) -> str:
        return f"{len(self.sites)} sites, {spread(self.C.values())} subcomponents each"

    def tables(self) -> tuple[Table, ...]:
        """A table of the sites with the shapes of W, U and V."""
        shapes = [
            (site_cell(site.name), *row(f"{site.d_in} × {site.d_out}", f"{site.d_in} × {C}", f"{C} × {site.d_out}"))
            for site, C in zip(self.sites, self.C.values(), strict=True)
        ]
        return (Table(self.summary(), columns("site", "W", "U", "V"), tuple(shapes)),)

    def target_run(self, inputs: Inputs) -> TargetRun:
        """Run the target unchanged: its logits, bit-equal to a plain call, and each site's input, as it was when the site was called."""
        stored, blocks = StoredTensors(self._copied), list[BlockRun]()
        with torch.no_grad(), hooked([(block, partial(_keep_block, stored, blocks)) for block in self._blocks]):
            logits, given = self._inputs_of(stored, lambda: call(self.model, inputs))
        if stored.written():  # the model has overwritten tensors that were stored: run again, with copies
            self._copied |= stored.written()
            return self.target_run(inputs)
        for name, calls in given.items():
            if len(calls) != 1:
                raise SiteError(
                    f"site {name}: the model calls it {len(calls)} times per run; a site must be called exactly once. "
                    f"Leave it out: add '!{name}' to sites"
                )
        xs = {name: aligned(x, logits.shape[:-1]) for name, [x] in given.items()}
        return TargetRun(logits, xs, tuple(blocks), self.seen(xs))

    def _inputs_of(self, stored: StoredTensors, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """The result of `run`, and each site's inputs in it, one for each call."""
        given: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        with watched(self.sites, lambda site, x: given[site.name].append(stored(site.place, x))):
            return run(), given

    @torch.no_grad()
    def find_blocks(self, inputs: Inputs) -> None:
        """Find the model's chain of blocks, so that a plan can start at the first block that it changes.

        A chain is a `ModuleList` in which each module's output is the input of the next. It is used only if, on `inputs`, runs
        that start inside the chain give the same logits as whole runs.
        """
        self._blocks = max(block_chains(self.model, inputs), key=lambda chain: len(self._homes(chain)), default=())
        self._home = self._homes(self._blocks)
        if not self._starts_anywhere(inputs):
            self._blocks, self._home = (), {}

    def _starts_anywhere(self, inputs: Inputs) -> bool:
        starts = sorted(set(self._home.values()) - {0})
        if not starts:
            return False
        target = self.target_run(inputs)
        off = {
            name: Replacement(U.new_zeros(*target.inputs[name].shape[:-1], U.shape[1])) for name, U in self.U.items() if name in self._home
        }
        ends = {starts[0], starts[-1]}
        plans: list[Plan] = [{}, *({name: off[name] for name, home in self._home.items() if home == start} for start in ends)]
        try:
            runs = self(inputs, plans, target), self(inputs, plans)
            return all(torch.allclose(entered, whole, rtol=1e-3, atol=1e-4) for entered, whole in zip(*runs, strict=True))
        except (RuntimeError, TypeError, ValueError, IndexError, StopIteration):  # runs cannot start inside these blocks
            return False

    def _homes(self, blocks: Sequence[nn.Module]) -> dict[str, int]:
        owners = {module: i for i, block in enumerate(blocks) for module in block.modules()}
        return {site.name: owners[site.place.module] for site in self.sites if site.place.module in owners}

    def entry(self, plan: Plan) -> int:
        """Index of the first block that a plan changes: its run can start there. 0 if it must run through the whole model."""
        return min((self._home.get(name, 0) for name in plan), default=0)

    def forward(self, inputs: Inputs, plans: Sequence[Plan], target: TargetRun | None = None) -> Float[Tensor, "plan batch *pos token"]:
        """The masked run: the logits of all plans, from one forward pass with the plans stacked along the batch axis.

        target: the target's run on the same sequences, used to skip the blocks before a plan's first site. Defaults to None: skip none.
        """
        for name in {name for plan in plans for name in plan} - set(self.names):
            raise SiteError(f"plan names {name}, which is no site of this decomposition; its sites: {', '.join(self.names)}")
        runs = () if target is None else target.blocks
        starts = [self.entry(plan) if runs else 0 for plan in plans]
        order = sorted(range(len(plans)), key=starts.__getitem__)
        active = [sum(start <= i for start in starts) for i in range(len(self._blocks))]  # number of plans that run through each block
        plans = [plans[i] for i in order]
        calls: Counter[Site] = Counter()
        products: dict[Site, Product] = {}
        for site, U, V in zip(self.sites, self._U, self._V, strict=True):
            replacements = [plan.get(site.name) for plan in plans[: active[self._home[site.name]] if site.name in self._home else None]]
            if any(replacement is not None for replacement in replacements):
                product = stacked_product(site, U, V, replacements, copies=site.place in self._copied)
                products[site] = replace(product, compute=partial(_counted, calls, site, product.compute))
        stacked = inputs if len(plans) == 1 else _repeated(inputs, len(plans))
        with replaced(products), swapped_in(_entering(self._blocks, runs, active) if max(starts) > 0 else {}):
            logits = call(self.model, stacked)
        for site in products:
            if calls[site] != 1:
                raise SiteError(f"site {site.name}: called {calls[site]} times in a masked run; a site must be called exactly once")
        logits = logits.unflatten(0, (len(plans), -1))
        if order == sorted(order):
            return logits
        of_run = logits.unbind()
        return torch.stack([of_run[order.index(i)] for i in range(len(order))])

    def masked_inputs(self, inputs: Inputs, plan: Plan) -> dict[str, Float[Tensor, "batch *pos d_in"]]:
        """Each site's input in the masked run of `plan`."""
        stored = StoredTensors(self._copied)
        logits, seen = self._inputs_of(stored, lambda: self(inputs, [plan])[0])
        if stored.written():
            self._copied |= stored.written()
            return self.masked_inputs(inputs, plan)
        return {name: aligned(given, logits.shape[:-1]) for name, [given] in seen.items()}


def _repeated(inputs: Inputs, times: int) -> Inputs:
    """The batch repeated `times` times along its first axis; tensors without a batch axis are unchanged."""
    rows = row_count(inputs)
    return map_tensors(lambda t: t.repeat(times, *[1] * (t.dim() - 1)) if t.dim() and t.shape[0] == rows else t, inputs)


def block_chains(model: nn.Module, inputs: Inputs) -> list[tuple[nn.Module, ...]]:
    """Every `ModuleList` of `model` whose modules are called once each, in order, each with the output of the one before."""
    lists = [tuple(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    calls: list[tuple[nn.Module, Tensor | None, Tensor | None]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        calls.append((module, _hidden(args), _hidden(output)))

    with hooked([(module, keep) for module in {module for chain in lists for module in chain}]):
        call(model, inputs)
    chains = []
    for chain in lists:
        own = [each for each in calls if each[0] in chain]
        handed_on = all(after[1] is not None and after[1] is before[2] for before, after in pairwise(own))
        if tuple(module for module, _, _ in own) == chain and handed_on:
            chains.append(chain)
    return chains


def _hidden(values: Any) -> Tensor | None:
    """The hidden state in a block's arguments or output: the tensor itself, or the first of several values."""
    first = values[0] if isinstance(values, tuple | list) and values else values
    return first if isinstance(first, Tensor) else None


def _keep_block(
    stored: StoredTensors, blocks: list[BlockRun], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    hidden, returned = _hidden(args), _hidden(output)
    rows = None if hidden is None else hidden.shape[0]
    batched = tuple(tensor.dim() > 0 and tensor.shape[0] == rows for tensor in tensors_of((args[1:], kwargs)))
    if returned is not None and (own := stored(module, returned)) is not returned:
        output = own if isinstance(output, Tensor) else (own, *output[1:])
    blocks.append(BlockRun(output, batched))


def _entering(blocks: Sequence[nn.Module], runs: Sequence[BlockRun], active: Sequence[int]) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards of the blocks when only the first `active[i]` of the stacked plans run through block i.

    Plans that start at a block get the target's activations there. A block that no plan runs through is skipped. Other arguments with a
    batch axis are cut to the plans that run.
    """
    plans = active[-1]

    def forward(i: int, original: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not active[i]:
            return runs[i].output
        if i == 0:
            rows = hidden.shape[0] // plans
            hidden = hidden[: active[0] * rows]
        else:
            before = _hidden(runs[i - 1].output)
            assert before is not None
            rows = before.shape[0]
            entering = before.expand(active[i] - active[i - 1], *before.shape).flatten(0, 1)
            hidden = torch.cat([hidden[: active[i - 1] * rows], entering])
        batched = iter(runs[i].batched)

        def cut(tensor: Tensor) -> Tensor:
            grows = next(batched) and tensor.shape[0] == plans * rows
            return tensor[: active[i] * rows] if grows else tensor

        args, kwargs = map_tensors(cut, (args, kwargs))
        return original(hidden, *args, **kwargs)

    return {block: partial(forward, i, block.forward) for i, block in enumerate(blocks)}


def _counted(calls: "Counter[Site]", site: Site, compute: Callable[[Tensor, TargetRows], Tensor], x: Tensor, target: TargetRows) -> Tensor:
    calls[site] += 1
    return compute(x, target)


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's logits on a copy of the inputs, so that the model may overwrite it.

    The logits are its output, the output's `.logits` or ["logits"], or the first tensor with two or more axes in a tuple or list such
    as (loss, logits). Raises `BatchError` for any other output.
    """
    inputs = map_tensors(Tensor.clone, inputs)
    if isinstance(inputs, Mapping):
        output: Any = model(**inputs)
    elif isinstance(inputs, tuple | list):
        output = model(*inputs)
    else:
        output = model(inputs)
    logits = _logits(output)
    if not isinstance(logits, Tensor):
        raise BatchError(f"the model returned {type(output).__name__}; it must return logits or an output with .logits")
    return logits


def _logits(output: Any) -> Any:
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if named is not None or not isinstance(output, tuple | list):
        return output if named is None else named
    tensors = [each for each in output if isinstance(each, Tensor)]
    return next((each for each in tensors if each.dim() > 1), tensors[0] if tensors else output)
