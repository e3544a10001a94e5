"""What a configuration will need, told before anything is started: parameters and bytes by part."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from paramlens import native
from paramlens.config import Config
from paramlens.errors import ConfigError
from paramlens.importance import Importance
from paramlens.losses import stack_size
from paramlens.shown import Shown
from paramlens.sites import Site
from paramlens.tables import Table, columns, row

_ADAM_STATE = 2
"""Moments per parameter."""


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """parameters, bytes: part → count. bytes holds weights, gradients, optimizer state, and an estimate of one step's activations."""

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
        sizes = {name: f"{count / 2**20:,.1f}" for name, count in self.bytes.items()}
        return tuple(
            Table(
                title,
                columns("part", unit),
                tuple(row(name, text, tone="strong" if name in ("trained", "total") else "plain") for name, text in parts.items()),
            )
            for title, unit, parts in ((f"Parameters ({self.sites} sites)", "count", counts), ("Memory of a step", "MiB", sizes))
        )


def diagnose(config: Config, sites: Sequence[Site], *, length: int, vocabulary: int) -> Diagnosis:
    """Count U, V and γ of `sites` and estimate a step's memory at `config.batch` sequences of `length` tokens.

    Activations are the most that one step holds: γ's inputs, and pre-activations, importances and their gradients; in one pass of
    plans the sites' inputs and outputs, the logits and their gradients, and, where no compiled loop recomputes them, masks and
    inner activations. What the target keeps between its sites (attention patterns, say) is not counted.
    """
    with torch.device("meta"):
        shapes = {site.name: (site.d_in, config.C) for site in sites}
        gamma = sum(value.numel() for value in Importance(shapes, config.gamma, max_length=length).parameters())
    factors = sum((site.d_in + site.d_out) * config.C for site in sites)
    word = torch.finfo(getattr(torch, config.dtype)).bits // 8
    positions = config.batch * length
    kind, d_gate, C = config.gamma.kind, config.gamma.d_gate, config.C
    read = sum({"scalar": C, "vector": site.d_in, "attention": 6 * site.d_in, "shared": site.d_in}[kind] for site in sites)
    hidden = len(sites) * {"scalar": 0, "vector": 0, "attention": 2 * length, "shared": 2 * d_gate}[kind]
    samples, losses = config.losses.samples, config.losses
    whole = samples * bool(losses.stochastic_recon) + bool(losses.recon)
    whole += samples * bool(losses.stochastic_recon_partial) + bool(losses.recon_partial)
    alone = len(sites) if losses.layerwise_sites == "all" else min(len(sites), losses.layerwise_sites)
    each = alone * (samples * bool(losses.stochastic_recon_layerwise) + bool(losses.recon_layerwise))
    seen = config.batch if config.last_token_only else positions
    plans = min(whole + each, stack_size(seen * vocabulary, device=torch.device(config.device).type))
    replaced = min(whole, plans) * len(sites) + max(0, plans - whole)
    compiled = native.serves(torch.empty(0, dtype=getattr(torch, config.dtype), device="cpu" if config.device == "cpu" else "meta"))
    activations = {
        "gamma activations": (read + hidden + 4 * len(sites) * C) * positions * word,
        "masks and inner activations": 0 if compiled else 3 * replaced * positions * C * word,
        "site inputs and outputs": plans * sum(site.d_in + site.d_out for site in sites) * positions * word,
        "logits": 3 * plans * seen * vocabulary * word,
    }
    trained = factors + gamma
    return Diagnosis(
        sites=len(sites),
        parameters={"U and V": factors, "gamma": gamma, "trained": trained, "decomposed weights": sum(s.d_in * s.d_out for s in sites)},
        bytes={
            "U and V": factors * word,
            "gamma": gamma * word,
            "gradients": trained * word,
            "optimizer": _ADAM_STATE * trained * word,
            **activations,
            "total": (2 + _ADAM_STATE) * trained * word + sum(activations.values()),
        },
    )


def require_memory(config: Config, sites: Sequence[Site], *, length: int, vocabulary: int, free: int | None = None) -> None:
    """Raise `ConfigError` if the run needs more than is free on its device, naming what to lower and the figures for each.

    free: bytes; none: what the device tells, and no check where it does not.
    """
    free = free_memory(config.device) if free is None else free

    def needed(field: str = "C", value: object = config.C, *, count: int = len(sites)) -> int:
        owner, _, leaf = field.rpartition(".")
        update = {"gamma": config.gamma.model_copy(update={leaf: value})} if owner else {leaf: value}
        return diagnose(config.model_copy(update=update), sites[:count], length=length, vocabulary=vocabulary).bytes["total"]

    total = needed()
    if free is None or total <= free:
        return
    kinds = [(kind, needed("gamma.kind", kind)) for kind in ("shared", "scalar")]
    remedies = [f"gamma.kind {kind} ({size_text(size)})" for kind, size in kinds if size < 0.8 * total]
    for field, value in (("gamma.d_gate", config.gamma.d_gate), ("C", config.C)):
        halves = [value >> shift for shift in range(1, value.bit_length())]
        fitting = next((half for half in halves if needed(field, half) <= free), None)
        if fitting is not None:
            remedies.append(f"{field} {fitting} ({size_text(needed(field, fitting))})")
    count = next((count for count in range(len(sites) - 1, 0, -1) if needed(count=count) <= free), None)
    if count is not None:
        remedies.append(f"fewer sites (the first {count} of {len(sites)}: {size_text(needed(count=count))})")
    raise ConfigError(
        f"needs {size_text(total)} of memory on {config.device}, {size_text(free)} are free; "
        f"lower one of: {', '.join(remedies) or 'batch'}. `paramlens doctor` lists the parts"
    )


def free_memory(device: str) -> int | None:
    """Bytes free on a device; none where it does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def size_text(count: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
