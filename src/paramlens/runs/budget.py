"""Estimate what a run will need before it starts: parameters and bytes by part."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from paramlens.config.model import Config
from paramlens.display.result import Result
from paramlens.display.tables import Table, columns, row
from paramlens.errors import ConfigError, ParamLensError
from paramlens.kernels import native
from paramlens.kernels.resources import free_memory
from paramlens.method.batch import Inputs, map_tensors, row_count
from paramlens.method.decomposition import Decomposition
from paramlens.method.importance.kind import kind_class
from paramlens.method.importance.settings import KINDS
from paramlens.method.losses.loss import enabled
from paramlens.method.losses.reconstruction import Reconstruction, stack_size
from paramlens.method.masks import Replacement
from paramlens.method.sites import Site, at_rest
from paramlens.method.start import subcomponents

_ADAM_STATE = 2
"""Numbers that Adam keeps per parameter."""

CHECKED = 7
"""Number of logit tensors of one plan, with all positions, that the checks of the first batch hold at once."""

SCATTERED = 1.25
"""Factor on the memory that every step allocates and frees, as a process does not give back the gaps between allocations."""

MOST_NUMBERS = 2**61
"""Count of fp32 numbers whose size in bytes no longer fits into 64 bits."""

COMPILED = 64 * 2**20
"""Bytes of the CPU's compiled loops and of their compiler."""


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """parameters, bytes: part → count. bytes has libraries, weights, gradients, optimizer state, and an estimate for one step."""

    sites: int
    parameters: dict[str, int]
    bytes: dict[str, int]

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        return f"{self.sites} sites: {self.parameters['trained']:,} parameters to train, {size_text(self.bytes['total'])}"

    def tables(self) -> tuple[Table, ...]:
        """Parameters and bytes by part."""
        counts = {name: f"{count:,}" for name, count in self.parameters.items()}
        sizes = {name: f"{count / 2**20:,.1f}" for name, count in self.bytes.items() if count}
        return tuple(
            Table(
                title,
                columns("part", unit),
                tuple(row(name, text, tone="strong" if name in ("trained", "total") else "plain") for name, text in parts.items()),
            )
            for title, unit, parts in ((f"Parameters ({self.sites} sites)", "count", counts), ("Memory of a run", "MiB", sizes))
        )


@dataclass(frozen=True)
class Footprint:
    """The size of a batch, and of what a masked run of it keeps for the gradient.

    rows: sequences in the batch. length: positions in each. vocabulary: size of the logits' last dimension.
    kept: bytes that the model keeps per sequence when all sites are replaced, as measured by `footprint`. None: not known.
    last: whether the model can compute the logits of the last position alone.
    """

    rows: int
    length: int
    vocabulary: int
    kept: int | None = None
    last: bool = False


def footprint(model: nn.Module, sites: Sequence[Site], inputs: Inputs, *, last: bool = False) -> Footprint | None:
    """Measure a batch by running its first sequence alone, masked and with gradients. The model may be on the meta device.

    Returns None if the model cannot be run on one sequence.
    """
    rows = row_count(inputs)
    first = map_tensors(lambda tensor: tensor[:1] if tensor.dim() and tensor.shape[0] == rows else tensor, inputs)
    probe = Decomposition(model, sites, C=1, dtype=sites[0].W.dtype)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    try:
        with at_rest(model):
            target = probe.target_run(first)
            plan = {name: Replacement(x.new_zeros(*x.shape[:-1], 1)) for name, x in target.seen.items()}
            with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
                probe(first, [plan])
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ParamLensError):
        return None
    standing = {id(tensor.untyped_storage()) for tensor in [*model.parameters(), *model.buffers(), *probe.parameters()]}
    held = sum(storage.nbytes() for key, storage in kept.items() if key not in standing)
    length = max(x[..., 0].numel() for x in target.inputs.values())
    return Footprint(rows, length, target.logits.shape[-1], held, last)


def diagnose(config: Config, sites: Sequence[Site], size: Footprint, *, target: int = 0, libraries: int = 0) -> Diagnosis:
    """Count U, V and γ of `sites` and estimate the memory of a step on a batch of that size.

    target, libraries: bytes of the target and of the libraries; 0 if they are already in memory.
    The total is the sum of the parts' maxima, as if all came at the same time, because freed memory is rarely given back completely.
    Raises `ConfigError` for sizes that no machine could hold.
    """
    word = torch.finfo(getattr(torch, config.dtype)).bits // 8
    C = subcomponents(config.C, sites)
    factors = sum((site.d_in + site.d_out) * C for site in sites)
    gamma, copied = _gamma_parameters(config, sites, size.length, C)
    trained = factors + gamma
    weights = sum(site.d_in * site.d_out for site in sites)
    passing = {"gamma activations": _gamma_activations(config, sites, size, C) * word, **_masked_runs(config, sites, size, C, word)}
    step = {
        **{name: round(SCATTERED * count) for name, count in passing.items()},
        "gamma working copies": copied * word,
        "faithfulness": weights * word * bool(config.losses.faithfulness or config.init.warmup_steps),
        "projection": 6 * weights * 8 * (config.optim.project_from is not None),
    }
    saving = _ADAM_STATE * trained * word * (torch.device(config.device).type == "cpu")
    sizes = {
        "libraries": libraries,
        "target": target,
        "U and V": factors * word,
        "gamma": gamma * word,
        "gradients": (trained + factors) * word,
        "optimizer": _ADAM_STATE * trained * word,
        **step,
        "writing a checkpoint, beyond a step": max(0, saving - sum(step.values())),
    }
    return Diagnosis(
        sites=len(sites),
        parameters={"U and V": factors, "gamma": gamma, "trained": trained, "decomposed weights": weights},
        bytes={**sizes, "total": sum(sizes.values())},
    )


def _gamma_parameters(config: Config, sites: Sequence[Site], length: int, C: int) -> tuple[int, int]:
    """Number of γ's parameters, and the size of the largest one that is copied to rearrange it, with its gradient."""
    kind, table = kind_class(config.gamma.kind), config.gamma.max_length or length
    total = rearranged = 0
    for d_in, count in Counter(site.d_seen for site in sites).items():
        for parameter in kind.parameters_of_site(config.gamma, d_in=d_in, max_length=table).values():
            numbers = count * parameter.count(C)
            total += numbers
            rearranged = max(rearranged, 2 * numbers * parameter.rearranged)
    if kind.trunk is not None:
        d_in = sum(site.d_seen for site in sites)
        total += sum(parameter.count(C) for parameter in kind.trunk.parameters_of(config.gamma, d_in=d_in).values())
    if total >= MOST_NUMBERS:
        raise ConfigError(
            f"C {C}, gamma.d_gate {config.gamma.d_gate}, gamma.max_length {config.gamma.max_length}, gamma.width {config.gamma.width}: "
            "no machine has memory for that many parameters; lower them"
        )
    return total, rearranged


def _gamma_activations(config: Config, sites: Sequence[Site], size: Footprint, C: int) -> int:
    """Count of numbers: the sites' inputs, γ's inner activations, its pre-activations, the importances, and their gradients."""
    kind = kind_class(config.gamma.kind)
    kept = [kind.activations(config.gamma, d_in=site.d_seen, C=C, length=size.length) for site in sites]
    shared = 0 if kind.trunk is None else kind.trunk.activations(config.gamma, length=size.length)
    return (shared + sum(kept) + sum(site.d_seen + 5 * C for site in sites)) * size.rows * size.length


def _compiled(config: Config) -> bool:
    """Whether a run uses the CPU's compiled loops."""
    return native.serves(torch.empty(0, dtype=getattr(torch, config.dtype), device="cpu" if config.device == "cpu" else "meta"))


def _masked_runs(config: Config, sites: Sequence[Site], size: Footprint, C: int, word: int) -> dict[str, int]:
    """Bytes that one pass of plans keeps, and bytes of the logits and of the divergence."""
    positions = size.rows * size.length
    masked = [loss for loss in enabled(config.losses) if isinstance(loss, Reconstruction)]
    each = sum(loss.count(config.losses, len(sites)) for loss in masked if loss.sites == "each")
    whole = sum(loss.count(config.losses, len(sites)) for loss in masked if loss.sites != "each")
    seen = size.rows if config.last_token_only else positions
    computed = seen if size.last else positions
    plans = min(whole + each, stack_size(seen * size.vocabulary, device=torch.device(config.device).type))
    replaced = min(whole, plans) * len(sites) + max(0, plans - whole)
    through_sites = 2 * sum(site.d_in + site.d_out for site in sites) * size.length * word
    return {
        "masks and inner activations": 0 if _compiled(config) else 3 * replaced * positions * C * word,
        "masked runs": plans * size.rows * (through_sites if size.kept is None else size.kept),
        "logits": max(plans * (computed + seen) + positions + 2 * seen, CHECKED * positions) * size.vocabulary * word,
    }


def require_memory(config: Config, sites: Sequence[Site], size: Footprint, *, target: int = 0, free: int | None = None) -> None:
    """Raise `ConfigError` if the run needs more memory than is free on its device. The message lists what to lower, with numbers.

    target: bytes of the target; 0 if it is already in memory. free: bytes. Defaults to the device's free memory; unknown: no check.
    """
    free = free_memory(config.device) if free is None else free

    C = subcomponents(config.C, sites)

    def needed(field: str = "C", value: object = C, *, count: int = len(sites)) -> int:
        owner, _, leaf = field.rpartition(".")
        update = {"gamma": config.gamma.model_copy(update={leaf: value})} if owner else {leaf: value}
        rows = value if field == "batch" and isinstance(value, int) else size.rows
        changed, libraries = config.model_copy(update=update), COMPILED * _compiled(config)
        return diagnose(changed, sites[:count], replace(size, rows=rows), target=target, libraries=libraries).bytes["total"]

    total = needed()
    if free is None or total <= free:
        return
    kinds = [(kind, needed("gamma.kind", kind)) for kind in reversed(KINDS) if kind_class(kind).saves_memory]
    remedies = [f"gamma.kind {kind} ({size_text(amount)})" for kind, amount in kinds if amount < 0.8 * total]
    for field, value in (("batch", size.rows), ("gamma.d_gate", config.gamma.d_gate), ("C", C)):
        halves = [value >> shift for shift in range(1, value.bit_length())]
        fitting = next((half for half in halves if needed(field, half) <= free), None)
        if fitting is not None:
            remedies.append(f"{config.task.batch_field if field == 'batch' else field} {fitting} ({size_text(needed(field, fitting))})")
    count = next((count for count in range(len(sites) - 1, 0, -1) if needed(count=count) <= free), None)
    if count is not None:
        remedies.append(f"fewer sites (the first {count} of {len(sites)}: {size_text(needed(count=count))})")
    raise ConfigError(
        f"needs {size_text(total)} of memory on {config.device}, {size_text(free)} are free; "
        f"lower one of: {', '.join(remedies) or 'C, sites and the length of sequences together'}. `paramlens doctor` lists the parts"
    )


def size_text(count: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
