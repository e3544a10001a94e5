"""The circuit of a run: which subcomponents are active at which token role, and how faithful they are to the model (Table 1)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.analysis.adversary import STARTS, STEPS, Attack, Rung, adversarial_recon, attack
from paramlens.analysis.attention import attention_by_role, attention_divergence, attention_patterns
from paramlens.analysis.held_out import ALL_POSITIONS, HeldOut, data_of, held_out, role_names
from paramlens.analysis.interventions import Intervention, interventions
from paramlens.analysis.maps import AlignedImportance, aligned_importance
from paramlens.analysis.off_data import OffData, off_data
from paramlens.display.result import Result
from paramlens.display.tables import Cell, Table, columns, metric, row, shaded, site_cell
from paramlens.display.verdicts import Verdict, verdict_table, verdicts
from paramlens.errors import ConfigError
from paramlens.kernels.machine import machine
from paramlens.method.decomposition import Decomposition
from paramlens.method.evaluate import evaluate, mean_over_batches
from paramlens.method.generators import generator, seed_of
from paramlens.method.losses.divergence import LossAt
from paramlens.method.losses.faithfulness import left_out
from paramlens.method.sites import at_rest
from paramlens.method.task import EvaluatedOn, Task
from paramlens.method.threshold import ACTIVE, require_threshold
from paramlens.runs.rundir import Run

EXAMPLE_LENGTH = 128
"""Maximum length, in tokens, of an example whose attention patterns are kept."""


@dataclass(frozen=True)
class SiteCircuit:
    """One row of Tables 1a and 1b."""

    active: dict[str, float]
    """Role → mean number of subcomponents with g > threshold at positions of that role."""
    importance: dict[str, float]
    """Role → mean over positions of Σ_c g."""
    unique: int
    """Number of different subcomponents that are active at one or more evaluated positions (Table 1). Not those that `unique_to` selects,
    which are active in one sentence only."""
    subcomponents: dict[str, list[float]]
    """Role → mean importance of each of the C subcomponents, in [0, 1]."""
    silent: str | None
    """If no subcomponent is active anywhere, a text that says what this means. None: at least one is active."""
    remainder: float | None
    """‖W - U V‖ / ‖W‖, if the remainder is a component. None: it is not."""


@dataclass(frozen=True)
class PatternPair:
    """An attention pattern of the target and of the masked model (masks g): rows are queries, columns keys, rows sum to 1."""

    target: list[list[float]]
    masked: list[list[float]]


@dataclass(frozen=True)
class ExampleSequence:
    """One of the sequences: its tokens (if the input is tokens), roles, and the summed importance Σ_c g at each site and position."""

    tokens: list[str]
    """Text of the tokens, or their ids if the task has no texts."""
    roles: list[str]
    importance: dict[str, list[float]]
    attention: dict[str, PatternPair]
    """Attention pattern → [query][key], mean over heads; empty for more than `EXAMPLE_LENGTH` positions."""


@dataclass(frozen=True, repr=False)
class Circuit(Result):
    """Table 1 of a run, and what its subcomponents do (§6.1).

    metrics: faithfulness (eq. 1; relative: divided by the mean squared weight), reconstructions and attention_kl in nats, accuracies in
    [0, 1]. attention_kl is the KL at the query of each of the task's links, mean over links; other queries are no part of the
    circuit, and attention_kl_all is the mean over all of them. recon_worst is what the attack with the most steps of `adversary` found.
    """

    run: str
    step: int
    threshold: float
    sequences: int
    evaluated_on: EvaluatedOn
    """What the sequences are: held-out data, the training data, or the batches given to `open_run`."""
    roles: list[str]
    sites: dict[str, SiteCircuit]
    metrics: dict[str, float]
    attention_kl: dict[str, dict[str, float]]
    """Attention pattern → role, or "all" → KL(target ‖ masked) in nats, mean over heads and over queries of that role."""
    attention_by_role: dict[str, PatternPair]
    """Attention pattern → attention that queries of a role (rows) give to all keys of a role (columns), mean over heads."""
    interventions: list[Intervention]
    maps: dict[str, AlignedImportance]
    """Role that has exactly one position in every sequence → mean importance around it."""
    example: ExampleSequence
    adversary: list[Rung]
    """The worst masks found on the first batch, from several starts, after more and more steps; empty: not searched for."""
    attacked: dict[str, float]
    """Site → by how many nats the worst KL falls when the masks of this site alone are set back to g."""
    nothing_to_attack: str | None
    """If no subcomponent could be turned on by the attack, a text that says what its figures then are. None: some could, or no attack."""
    off_data: OffData | None
    """The same decomposition on inputs of another kind. None: the task has no such inputs."""
    verdicts: list[Verdict]
    """Whether the decomposition can be trusted."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        active = sum(site.unique for site in self.sites.values())
        return (
            f"{self.run}, step {self.step}: {len(self.sites)} sites, {active} subcomponents in use, recon {self.metrics['recon']:.2e} nats"
        )

    def tables(self) -> tuple[Table, ...]:
        """Tables 1a and 1b as one, with notes on silent sites; 1c; interventions, if they have more than a divergence; verdicts."""
        highest = max(count for site in self.sites.values() for count in site.active.values())
        places = 1 if len(self.roles) > _WIDE else 3
        active = Table(
            f"Active subcomponents (importance > {self.threshold:g}), {self.sequences} {self.evaluated_on} sequences",
            columns("site", *self.roles, "unique", *(["‖Δ‖ / ‖W‖"] if "remainder" in self.metrics else [])),
            tuple(
                (
                    site_cell(name),
                    *(shaded(f"{site.active[role]:.{places}f}", site.active[role], highest) for role in self.roles),
                    Cell(str(site.unique)),
                    *([] if site.remainder is None else [Cell(f"{site.remainder:.2f}")]),
                )
                for name, site in self.sites.items()
            ),
            notes=tuple(Cell(f"{name} is silent: it {site.silent}", "warn") for name, site in self.sites.items() if site.silent),
        )
        numbers = self.metrics | ({} if self.off_data is None else {"recon_off_data": self.off_data.recon})
        metrics = Table(
            "Faithfulness, divergences in nats, accuracies",
            columns("metric", "value"),
            tuple(row(name, metric(name, value)) for name, value in numbers.items()),
            notes=() if self.off_data is None else (Cell(f"off data: {self.off_data.what}", "faint"),),
        )
        worst = [_attack_table(self.adversary, self.attacked, self.nothing_to_attack)] if self.adversary else []
        telling = any(change.attention or change.accuracy is not None for change in self.interventions)
        return active, metrics, *([_changes(self.interventions)] if telling else []), *worst, verdict_table(self.verdicts)


ATTACKED = 4
"""Number of batches that are attacked from one start each."""

_WIDE = 6
"""Up to this many roles, the table shows three decimal places; with more roles, one."""


def _attack_table(rungs: Sequence[Rung], attacked: Mapping[str, float], lacking: str | None) -> Table:
    site, most = max(attacked.items(), key=lambda each: each[1])
    rows = tuple(
        row(str(rung.steps), f"{rung.one_start:.3f}", f"{rung.worst:.3f}", "-" if rung.share is None else f"{rung.share:.2f}")
        for rung in rungs
    )
    most_at = f"most of it at {site}: with the masks of this site put back to the importances, {most:.3g} nats less"
    return Table(
        "Worst masks on the first batch, KL in nats",
        columns("steps of ascent", "one start", f"worst of {STARTS} starts", "share of KL with all off"),
        rows,
        notes=(Cell(most_at, "faint") if lacking is None else Cell(lacking, "warn"),),
    )


def _changes(changes: Sequence[Intervention]) -> Table:
    links = list(changes[0].attention)
    return Table(
        "Interventions: one site's active subcomponents removed, or kept alone, and other changes (§6.1)",
        columns("change", "KL, nats", "accuracy", *(link.replace("_", " ") for link in links)),
        tuple(
            row(
                change.name,
                f"{change.kl:.2e}",
                "-" if change.accuracy is None else f"{change.accuracy:.4f}",
                *(f"{change.attention[link]:.3f}" for link in links),
            )
            for change in changes
        ),
    )


def circuit(run: Run, *, threshold: float = ACTIVE, batches: int = 16, adversary: int = STEPS) -> Circuit:
    """Table 1 of `run` on `batches` held-out batches: a (active by role), b (unique), c (metrics); interventions and maps.

    A task without held-out batches is evaluated on its training data, and `evaluated_on` says so. A task without roles has one, "all".

    adversary: number of steps of projected gradient ascent to the worst masks; 0 leaves it out. recon_adversarial is from one start, mean
    over the first four batches; `Circuit.adversary` is from several, on the first batch, after 20, 40, 80 ... steps up to this number.
    Raises `ConfigError` for a number out of range and for a run on your own model that was opened without batches.
    """
    task = data_of(run)
    require_threshold(threshold)
    if adversary < 0:
        raise ConfigError(f"adversary {adversary}: give a number of steps, 0 to leave it out")
    decomposition, last_token_only, roles = run.decomposition, run.config.last_token_only, role_names(task)
    with at_rest(task.model), machine(run.config):
        data = held_out(run, batches=batches)
        metrics = _metrics(run, task, data, threshold=threshold, adversary=adversary)
        changed = interventions(decomposition, task, data, threshold=threshold, last_token_only=last_token_only)
        worst = _attacked(run, task, data[0], adversary) if adversary else None
        metrics |= {} if worst is None else {"recon_worst": worst.rungs[-1].worst}
        lacking = None if worst is None else worst.lacking
        elsewhere = off_data(run, data, threshold=threshold)
        patterns = [_patterns(decomposition, held, task.attention_patterns) for held in data]
    ragged = len({held.roles.shape[1:] for held in data}) > 1  # batches of different lengths cannot be stacked
    role_index = torch.cat([held.roles.flatten() if ragged else held.roles for held in data])
    g = {name: torch.cat([held.g[name].flatten(0, -2) if ragged else held.g[name] for held in data]) for name in decomposition.names}
    divergence = {
        name: _by_role(torch.cat([attention_divergence(*pair[name]) for pair in patterns]), role_index, roles)
        for name in task.attention_patterns
    }
    if divergence:
        everywhere = [each[ALL_POSITIONS] for each in divergence.values()]
        linked = [divergence[link.pattern][link.query] for link in task.links]
        metrics |= {"attention_kl": _average(linked or everywhere), "attention_kl_all": _average(everywhere)}
    remainders = decomposition.remainders() if decomposition.delta else {}
    trained = None if run.target_history is None else asdict(run.target_history)
    return Circuit(
        run=str(run.path),
        step=run.step,
        threshold=threshold,
        sequences=sum(len(held.roles) for held in data),
        evaluated_on=task.evaluated_on,
        roles=roles,
        sites={
            name: _site(value, role_index, roles, threshold, if_silent=_if_silent(run, name, threshold), remainder=remainders.get(name))
            for name, value in g.items()
        },
        metrics=metrics,
        attention_kl=divergence,
        attention_by_role={
            name: PatternPair(*(_attention_by_role([pair[name][side] for pair in patterns], role_index, len(roles)) for side in (0, 1)))
            for name in task.attention_patterns
        },
        interventions=changed,
        maps=aligned_importance(g, role_index, roles) if task.roles and not data[0].batch.texts else {},  # roles other than tokens
        example=_example(data[0], roles, patterns[0]),
        adversary=[] if worst is None else worst.rungs,
        attacked={} if worst is None else worst.sites,
        nothing_to_attack=lacking,
        off_data=elsewhere,
        verdicts=list(
            verdicts(metrics, off_data=None if elsewhere is None else asdict(elsewhere), target=trained, nothing_to_attack=lacking)
        ),
    )


def _attacked(run: Run, task: Task, held: HeldOut, steps: int) -> Attack:
    rungs = [STEPS * 2**i for i in range(steps.bit_length()) if STEPS * 2**i < steps]
    last_token_only = run.config.last_token_only
    return attack(
        run.decomposition,
        task.loss_inputs(held.batch, last_token_only=last_token_only),
        held.target,
        held.g,
        at=LossAt(last_token_only, held.batch.present),
        generator=generator(run.config.seed, "attack"),
        steps=[*rungs, steps],
    )


def _metrics(run: Run, task: Task, data: Sequence[HeldOut], *, threshold: float, adversary: int) -> dict[str, float]:
    last_token_only, seed = run.config.last_token_only, run.config.seed
    rows: list[dict[str, float]] = []
    for index, held in enumerate(data):
        row = evaluate(
            task,
            run.decomposition,
            held.batch,
            held.target,
            held.g,
            last_token_only=last_token_only,
            threshold=threshold,
            seed=seed_of(seed, index),
        )
        if adversary and index < ATTACKED:
            row["recon_adversarial"] = adversarial_recon(
                run.decomposition,
                task.loss_inputs(held.batch, last_token_only=last_token_only),
                held.target,
                held.g,
                at=LossAt(last_token_only, held.batch.present),
                generator=generator(seed, "adversary", index),
                steps=adversary,
            )
        rows.append(row)
    counts = [LossAt(last_token_only, held.batch.present).count(held.target.logits) for held in data]
    of_all = {name: [row[name] for row in rows if name in row] for name in rows[0]}
    metrics = {name: mean_over_batches(values, counts[: len(values)]) for name, values in of_all.items()}
    return metrics | left_out(run.decomposition)


def _patterns(decomposition: Decomposition, held: HeldOut, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Attention pattern → (of the target, of the masked model)."""
    target, masked = (attention_patterns(decomposition, held.batch, [plan], names) for plan in ({}, held.masked))
    return {name: (target[name], masked[name]) for name in names}


def _attention_by_role(patterns: Sequence[Tensor], role_index: Tensor, count: int) -> list[list[float]]:
    return _rounded(attention_by_role(torch.cat(list(patterns)), role_index, count))


def _site(
    g: Float[Tensor, "*batch C"],
    role_index: Tensor,
    roles: Sequence[str],
    threshold: float,
    *,
    if_silent: str,
    remainder: float | None,
) -> SiteCircuit:
    active = g > threshold
    unique = int(active.flatten(0, -2).any(0).sum())
    counts, sums = active.sum(-1, dtype=torch.float64), g.sum(-1, dtype=torch.float64)
    return SiteCircuit(
        active={role: _mean(counts[role_index == i]) for i, role in enumerate(roles)},
        importance={role: _mean(sums[role_index == i]) for i, role in enumerate(roles)},
        unique=unique,
        subcomponents={role: [round(v, 5) for v in g[role_index == i].mean(0).tolist()] for i, role in enumerate(roles)},
        silent=if_silent if unique == 0 else None,
        remainder=remainder,
    )


def _if_silent(run: Run, name: str, threshold: float) -> str:
    site = next(site for site in run.decomposition.sites if site.name == name)
    added_after = run.config.task.adds_positions_after_projection
    return silence(name, has_bias=site.bias is not None, threshold=threshold, added_after=added_after)


def silence(site: str, *, has_bias: bool, threshold: float, added_after: bool) -> str:
    """A text that says what a site does if no subcomponent exceeds the threshold (footnote 3): such a site still has an effect.

    Zero queries or keys make attention uniform unless a bias or a position encoding is added to them after the projection.
    """
    output = "its bias alone" if has_bias else "zero"
    text = f"has no subcomponent above {threshold:g} anywhere; with all of them off it writes {output}"
    leaf = site.rsplit(".", 1)[-1].split("[")[-1].rstrip("]")
    if leaf in ("q", "k", "q_proj", "k_proj", "query", "key") and not has_bias and not added_after:
        return f"{text}, so every attention score is the same: attention is uniform over what it may see, not off"
    return f"{text}, and the rest of the model runs without what this site contributes"


def _by_role(values: Float[Tensor, "batch pos"], role_index: Tensor, roles: Sequence[str]) -> dict[str, float]:
    means = {role: _mean(values[role_index == i]) for i, role in enumerate(roles)}
    return means | {ALL_POSITIONS: _mean(values[role_index >= 0])}


def _example(held: HeldOut, roles: Sequence[str], patterns: Mapping[str, tuple[Tensor, Tensor]]) -> ExampleSequence:
    ids, texts = held.batch.token_ids, held.batch.texts
    role_index = held.roles[0].reshape(-1)
    own = role_index >= 0
    tokens = list(texts[0]) if texts else [] if ids is None else [str(token) for token in ids[0][own].tolist()]
    return ExampleSequence(
        tokens=tokens,
        roles=[str(roles[i]) for i in role_index[own].tolist()],
        importance={name: [round(v, 5) for v in value[0].sum(-1).reshape(-1)[own].tolist()] for name, value in held.g.items()},
        attention={
            name: PatternPair(*(_rounded(side[0].mean(0)) for side in pair))
            for name, pair in patterns.items()
            if pair[0].shape[-1] <= EXAMPLE_LENGTH
        },
    )


def _rounded(table: Float[Tensor, "row column"]) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in table.tolist()]


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean(values: Tensor) -> float:
    return values.double().mean().item() if values.numel() else 0.0
