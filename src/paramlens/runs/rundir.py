"""A run directory opened for reading: `Run` and `open_run`. Everything after training starts from here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paramlens.config.file import load_config
from paramlens.config.model import Config
from paramlens.display.result import Result
from paramlens.display.tables import Chart, Column, Line, Table, columns, metric, row, spread
from paramlens.display.verdicts import Verdict, verdict_table, verdicts
from paramlens.errors import RunDirError
from paramlens.files.plain import json_line, read_json, write_json
from paramlens.files.tensorfile import require_fit
from paramlens.method.batch import Batches
from paramlens.method.decomposition import Decomposition
from paramlens.method.importance.network import Importance
from paramlens.method.losses.faithfulness import left_out
from paramlens.method.modes import default_modes
from paramlens.method.sites import named_sites
from paramlens.method.task import EvaluatedOn, TargetHistory, Task
from paramlens.runs import targets
from paramlens.runs.checkpoint import LOADED, load_parameters, require_whole, subcomponents
from paramlens.runs.description import ModelDescription, read_description
from paramlens.runs.hub import locate
from paramlens.runs.integrity import require_own, require_target, require_whole_run
from paramlens.runs.layout import (
    checkpoint_step,
    find_checkpoint,
    read_metrics,
    require_run,
)
from paramlens.runs.sharing import push_to_hub
from paramlens.tasks.batches import own_task


@dataclass(frozen=True, repr=False)
class Run(Result):
    """A run directory opened for reading: the decomposition, γ, metrics, and the task if it can be rebuilt."""

    path: Path
    step: int
    """Number of steps done at the loaded checkpoint."""
    decomposition: Decomposition
    importance: Importance
    task: Task | None

    def __fspath__(self) -> str:
        return str(self.path)

    @cached_property
    def config(self) -> Config:
        """The content of `config.yaml`. U, V and γ are loaded without it."""
        return load_config(self.path / "config.yaml")

    @property
    def status(self) -> str:
        """One of running, interrupted, diverged, failed, finished."""
        return self.info["status"]

    @cached_property
    def info(self) -> dict[str, Any]:
        """The content of `run.json`."""
        return read_json(self.path / "run.json")

    @property
    def evaluated_on(self) -> EvaluatedOn:
        """The data of the evaluations in `metrics.jsonl`. Older runs do not record it; for them it follows from the task."""
        return self.info.get("evaluated_on", self.config.task.evaluated_on)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return read_metrics(self.path)

    @cached_property
    def target_history(self) -> TargetHistory | None:
        """The training history of a toy target. None for other targets."""
        return targets.history(read_description(self.path).rebuilt().task, self.path) if (self.path / "target.json").exists() else None

    @cached_property
    @torch.no_grad()
    def verdicts(self) -> tuple[Verdict, ...]:
        """Whether the decomposition can be trusted, by the last evaluation up to the loaded checkpoint. `circuit` adds more verdicts."""
        measured = [line["evaluation"] for line in self.metrics if "evaluation" in line and line["step"] <= self.step]
        now = left_out(self.decomposition)
        history = self.target_history
        return tuple(verdicts((measured[-1] if measured else {}) | now, target=None if history is None else asdict(history)))

    def summary(self) -> str:
        return f"{self.path}, {self.status} at step {self.step}: {self.decomposition.summary()}"

    def tables(self) -> tuple[Table, ...]:
        """What was decomposed and how, the last losses and evaluation, and whether the decomposition can be trusted."""
        described, info = read_description(self.path), self.info
        trained = [line for line in self.metrics if "losses" in line]
        target = f"{described.target.id} {described.target.revision or ''}".strip()
        about = {
            "target": target,
            "sites": f"{len(described.sites)}",
            "C": f"{spread(self.decomposition.C.values())} subcomponents a site",
            "γ": described.gamma.kind,
            "step": f"{self.step:,} of {info.get('steps', self.step):,}",
            "status": f"{info['status']}, {info.get('seconds', 0):,.0f} s",
        }
        facts = Table(
            str(self.path), (Column("", right=False), Column("", right=False)), tuple(row(*each) for each in about.items()), headed=False
        )
        last = dict(trained[-1]["losses"]) if trained else {}
        measured = next((line["evaluation"] for line in reversed(self.metrics) if "evaluation" in line), {})
        numbers = (
            Table(title, columns("", "value"), tuple(row(name, metric(name, value)) for name, value in values.items()))
            for title, values in (
                (f"Losses at step {trained[-1]['step'] if trained else 0:,}", last),
                (f"{'Held out' if self.evaluated_on == 'held-out' else 'Training data'}: nats, accuracies", measured),
            )
            if values
        )
        return facts, *numbers, verdict_table(self.verdicts)

    def charts(self) -> tuple[Chart, ...]:
        """The losses over the steps."""
        trained = [line for line in self.metrics if "losses" in line]
        names = list(trained[-1]["losses"]) if trained else []
        lines = (Line(name, tuple((line["step"], line["losses"][name]) for line in trained if name in line["losses"])) for name in names)
        return (Chart("Losses over the steps", "step", "loss", tuple(lines)),)

    def keep_analysis(self, name: str, entries: str, document: Mapping[str, Any], *, same: Sequence[str]) -> Path:
        """Add `document` to the list `entries` of `analysis/<name>.json`. It replaces an entry with the same values of the fields `same`.

        Entries of other checkpoints are removed.
        """
        path = self.path / "analysis" / f"{name}.json"
        before = read_json(path) if path.is_file() else {}
        kept = before[entries] if before.get("step") == self.step else []
        plain = json.loads(json_line(document))
        kept = [each for each in kept if any(each[key] != plain[key] for key in same)]
        return self.save_analysis(name, {"step": self.step, entries: [*kept, plain]})

    def push_to_hub(self, repo: str, **how: Any) -> str:
        """Upload the run directory, with the arguments and errors of `paramlens.push_to_hub`. Returns the commit's URL."""
        return push_to_hub(self, repo, **how)

    def save_analysis(self, name: str, document: Mapping[str, Any]) -> Path:
        """Write `analysis/<name>.json`."""
        path = self.path / "analysis" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, document)
        return path


@default_modes()
def open_run(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    batches: Batches | None = None,
    checkpoint: int | None = None,
    revision: str | None = None,
) -> Run:
    """Open a run directory at its newest checkpoint, or at step `checkpoint`.

    A string user/name that is not a local path is a repository on the Hugging Face Hub, fetched at the branch, tag or commit `revision`.
    model: the target of a run on your own model. batches: data for its analyses, as for `decompose`. Toy targets and their data are in
    the directory, and are opened on the CPU if the run's device is not available. Raises `RunDirError` if the path is not a run, has no
    checkpoint, needs a model that is not given, or was made from another model.
    """
    path = locate(path, revision=revision)
    require_run(path)
    find_checkpoint(path, checkpoint)  # first, as other files may also be missing in a run that has just begun
    described = require_whole_run(path)
    folder = _whole_checkpoint(path, checkpoint, described)
    task = None
    if model is None:
        task = _rebuild_task(path, described.rebuilt())
        model = task.model
    elif batches is not None:
        task = own_task(model, batches, evaluated_on="given")
    require_target(path, described, model)
    decomposition, importance = build(described, model)
    while True:
        try:
            load_parameters(folder, decomposition, importance)
        except RunDirError:
            if folder.is_dir():
                raise
            folder = _whole_checkpoint(path, checkpoint, described)
        else:
            return Run(path, checkpoint_step(folder), decomposition, importance, task)


def _whole_checkpoint(path: Path, step: int | None, described: ModelDescription) -> Path:
    """The newest checkpoint, or the one at `step`. Raises `RunDirError` if it is damaged or of another run.

    If a run in progress removes it during the check, because there are newer ones, the search starts again.
    """
    while True:
        folder = find_checkpoint(path, step)
        try:
            require_whole(folder, LOADED)
            require_own(folder, path)
            for name, tensors in described.tensors(subcomponents(folder, described)).items():
                require_fit(folder / f"{name}.safetensors", tensors)
        except RunDirError:
            if folder.is_dir():
                raise
        else:
            return folder


def build(described: ModelDescription, model: nn.Module) -> tuple[Decomposition, Importance]:
    """Decomposition and γ as `model.json` describes them, without loaded values. Raises `SiteError` if the model lacks a site."""
    sites = named_sites(model, [site.name for site in described.sites])
    decomposition = Decomposition(model, sites, C=described.C, dtype=getattr(torch, described.dtype), delta=described.delta)
    return decomposition, described.importance().to(sites[0].W.device)


def _rebuild_task(path: Path, config: Config) -> Task:
    if config.task.given_in_python:
        raise RunDirError(f"{path}: a run on your own model, which the directory does not hold; open_run(path, model=...) from Python")
    kind = torch.device(config.device).type
    if kind != "cpu" and not getattr(torch, kind).is_available():
        config = config.model_copy(update={"device": "cpu"})
    target = targets.load(config, path).to(config.device, config.dtype)
    return config.task.make(target, seed=config.seed, batch=config.batch)
