"""The circuit of a run: which subcomponents are active at which role of token, and how well they stand for the model (Table 1)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.analysis.attention import attention_divergence
from paramlens.analysis.held_out import ALL_POSITIONS, HeldOut, data_of, held_out, role_names
from paramlens.config import InductionTask
from paramlens.errors import ConfigError
from paramlens.evaluation import ACTIVE, evaluate
from paramlens.machine import machine
from paramlens.rundir import Run
from paramlens.sites import at_rest


@dataclass(frozen=True)
class SiteCircuit:
    """One row of Tables 1a and 1b."""

    active: dict[str, float]
    """Role → mean number of subcomponents with g > threshold at positions of that role."""
    importance: dict[str, float]
    """Role → mean over positions of Σ_c g."""
    unique: int
    """Subcomponents active at one evaluated position at least."""
    subcomponents: dict[str, list[float]]
    """Role → mean importance of each of the C subcomponents, in [0, 1]."""
    silent: str | None
    """What it means that no subcomponent is active anywhere; none if one is."""


@dataclass(frozen=True)
class ExampleSequence:
    """One held-out sequence: tokens (where the input is tokens), roles, and at each site and position the summed importance Σ_c g."""

    tokens: list[int]
    roles: list[str]
    importance: dict[str, list[float]]


@dataclass(frozen=True)
class Circuit:
    """Table 1 of a run. metrics: faithfulness (eq. 1), reconstructions and attention_kl in nats, accuracies in [0, 1]."""

    run: str
    step: int
    threshold: float
    sequences: int
    roles: list[str]
    sites: dict[str, SiteCircuit]
    metrics: dict[str, float]
    attention_kl: dict[str, dict[str, float]]
    """Attention pattern → KL(target ‖ masked) in nats, mean over heads and queries: of all positions, and of each role."""
    example: ExampleSequence

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def circuit(run: Run, *, threshold: float = ACTIVE, batches: int = 16) -> Circuit:
    """Table 1 of `run` on `batches` held-out batches: a (active by role), b (unique), c (metrics).

    The roles of a task without any are one, "all". attention_kl needs a task that names its attention patterns. Raises `ConfigError` for
    a run on your own model that was opened without batches.
    """
    task = data_of(run)
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold {threshold}: importances lie in [0, 1], so give a number from 0 to below 1")
    decomposition, config, roles = run.decomposition, run.config, role_names(task)
    rows: list[dict[str, float]] = []
    divergences: list[dict[str, Tensor]] = []
    with at_rest(task.model), machine(config):
        data = held_out(run, batches=batches)
        for held in data:
            rows.append(
                evaluate(
                    task,
                    decomposition,
                    held.batch,
                    held.target,
                    held.g,
                    last_token_only=config.last_token_only,
                    threshold=threshold,
                    seed=config.seed,
                )
            )
            if task.attention_patterns:
                divergences.append(attention_divergence(decomposition, held.batch, held.g, task.attention_patterns))
    role_index = torch.cat([held.roles for held in data])
    metrics = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    attention = {
        name: _by_role(torch.cat([divergence[name] for divergence in divergences]), role_index, roles) for name in task.attention_patterns
    }
    if attention:
        metrics["attention_kl"] = sum(block[ALL_POSITIONS] for block in attention.values()) / len(attention)
    return Circuit(
        run=str(run.path),
        step=run.step,
        threshold=threshold,
        sequences=len(role_index),
        roles=roles,
        sites={
            name: _site(
                torch.cat([held.g[name] for held in data]), role_index, roles, threshold, if_silent=_if_silent(run, name, threshold)
            )
            for name in decomposition.names
        },
        metrics=metrics,
        attention_kl=attention,
        example=_example(data[0], roles),
    )


def _site(g: Float[Tensor, "*batch C"], role_index: Tensor, roles: Sequence[str], threshold: float, *, if_silent: str) -> SiteCircuit:
    active = g > threshold
    unique = int(active.flatten(0, -2).any(0).sum())
    counts, sums = active.sum(-1, dtype=torch.float64), g.sum(-1, dtype=torch.float64)
    return SiteCircuit(
        active={role: _mean(counts[role_index == i]) for i, role in enumerate(roles)},
        importance={role: _mean(sums[role_index == i]) for i, role in enumerate(roles)},
        unique=unique,
        subcomponents={role: [round(v, 5) for v in g[role_index == i].mean(0).tolist()] for i, role in enumerate(roles)},
        silent=if_silent if unique == 0 else None,
    )


def _if_silent(run: Run, name: str, threshold: float) -> str:
    module, task = run.decomposition.model.get_submodule(name), run.config.task
    added_after = isinstance(task, InductionTask) and task.added == "after"
    return silence(name, has_bias=getattr(module, "bias", None) is not None, threshold=threshold, added_after=added_after)


def silence(site: str, *, has_bias: bool, threshold: float, added_after: bool) -> str:
    """What a site still does where no subcomponent exceeds the threshold (footnote 3): it is not unused.

    Zero queries or keys make attention uniform unless a bias or a position encoding is added to them after the projection.
    """
    output = "its bias alone" if has_bias else "zero"
    text = f"has no subcomponent above {threshold:g} anywhere; with all of them off it writes {output}"
    leaf = site.rsplit(".", 1)[-1]
    if leaf in ("q", "k", "q_proj", "k_proj", "query", "key") and not has_bias and not added_after:
        return f"{text}, so every attention score is the same: attention is uniform over what it may see, not off"
    return f"{text}, and the model runs on without what it carried"


def _by_role(values: Float[Tensor, "batch pos"], role_index: Tensor, roles: Sequence[str]) -> dict[str, float]:
    means = {role: _mean(values[role_index == i]) for i, role in enumerate(roles)}
    return means | {ALL_POSITIONS: _mean(values)}


def _example(held: HeldOut, roles: Sequence[str]) -> ExampleSequence:
    inputs = held.batch.inputs
    tokens = inputs[0].tolist() if isinstance(inputs, Tensor) and inputs.dim() == 2 and not inputs.is_floating_point() else []
    return ExampleSequence(
        tokens=tokens,
        roles=[str(roles[i]) for i in held.roles[0].reshape(-1).tolist()],
        importance={name: [round(v, 5) for v in value[0].sum(-1).reshape(-1).tolist()] for name, value in held.g.items()},
    )


def _mean(values: Tensor) -> float:
    return values.double().mean().item() if values.numel() else 0.0
