"""The run directory: the only bridge between training and everything after it.

config.yaml   resolved, runnable again          run.json   versions, device, dtype, threads, seed, target, status, seconds
model.json    format, sites, shapes, γ, target, task: all that loading needs
metrics.jsonl one line per logged step           target.safetensors, target.json   toy targets: weights, training checks
target/       a language model that was trained here, as a plain Hugging Face folder
MANIFEST.json bytes and sha256 of config.yaml, model.json and the target
checkpoints/  as checkpoint.py says              analysis/*.json, report.html
"""

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import paramlens
from paramlens.config.file import dump_config, load_config
from paramlens.config.model import Config
from paramlens.display.shown import Shown
from paramlens.display.tables import Chart, Column, Line, Table, columns, metric, row
from paramlens.display.verdicts import Verdict, verdict_table, verdicts
from paramlens.errors import RunDirError
from paramlens.files.manifest import MANIFEST, file_sha256, problems, write_manifest
from paramlens.files.plain import json_line, read_json, write_json, write_text
from paramlens.files.tensorfile import copy_into, require_fit
from paramlens.method.batch import Batches
from paramlens.method.decomposition import Decomposition
from paramlens.method.importance.network import Importance
from paramlens.method.losses.faithfulness import faithfulness, mean_square
from paramlens.method.modes import default_modes
from paramlens.method.sites import named_sites
from paramlens.method.task import EvaluatedOn, TargetHistory, Task
from paramlens.runs import targets
from paramlens.runs.checkpoint import LOADED, CheckpointState, load_state, prune, require_whole, write_checkpoint
from paramlens.runs.described import Described, describe, named_parameters, read_description, require_known_format
from paramlens.runs.hub import located
from paramlens.runs.layout import (
    FORMAT,
    checkpoint_step,
    checkpoints,
    clear,
    find_checkpoint,
    read_metrics,
    require_free,
    require_run,
    sweep,
)
from paramlens.runs.metrics import MetricsFile
from paramlens.tasks.base import FOLDER
from paramlens.tasks.batches import own_task


class RunDirectory:
    """The writing side of a run directory; one writer per run."""

    def __init__(self, path: Path, *, metrics: MetricsFile | None = None) -> None:
        self.path = path
        self.metrics = metrics or MetricsFile(path / "metrics.jsonl")

    @classmethod
    def create(cls, path: str | Path, config: Config, *, overwrite: bool = False) -> "RunDirectory":
        """A new directory holding `config.yaml` and `run.json`. Raises `RunDirError` as `layout.require_free` does."""
        path = Path(path)
        require_free(path, overwrite=overwrite)
        try:
            clear(path)
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / "config.yaml", dump_config(config))
            write_json(path / "run.json", {"format": FORMAT, "versions": versions()})
        except OSError as error:
            raise RunDirError(f"{path}: cannot be written ({error.strerror}); give another out") from None
        return cls(path)

    @classmethod
    def reopen(cls, path: Path, state: CheckpointState | None) -> "RunDirectory":
        """A directory taken up at a checkpoint, or at its beginning: leftovers removed, metrics cut back.

        Raises `RunDirError` for metrics that are not what the checkpoint recorded.
        """
        sweep(path)
        recorded, step = ({"bytes": 0, "sha256": hashlib.sha256().hexdigest()}, 0) if state is None else (state.metrics, state.step)
        return cls(path, metrics=MetricsFile.cut(path / "metrics.jsonl", recorded, step=step))

    def describe(self, config: Config, decomposition: Decomposition, importance: Importance, target: dict[str, Any]) -> None:
        """Write `model.json`, and the manifest over all that stays as it is from now on."""
        (self.path / "checkpoints").mkdir(exist_ok=True)
        write_json(self.path / "model.json", describe(config, decomposition, importance, target))
        self.seal()

    def reconfigure(self, config: Config) -> None:
        """Replace `config.yaml`."""
        write_text(self.path / "config.yaml", dump_config(config))
        self.seal()

    def seal(self) -> None:
        """Write `MANIFEST.json` over configuration, description and target."""
        files = [self.path / name for name in ("config.yaml", "model.json", "target.safetensors", "target.json")]
        files += sorted((self.path / FOLDER).glob("*"))
        write_manifest(self.path, [file for file in files if file.is_file()])

    @property
    def info(self) -> dict[str, Any]:
        """`run.json`."""
        return read_json(self.path / "run.json")

    def record(self, **fields: Any) -> None:
        """Add fields to `run.json`."""
        write_json(self.path / "run.json", self.info | fields)

    def save_checkpoint(
        self,
        config: Config,
        decomposition: Decomposition,
        importance: Importance,
        *,
        step: int,
        optimizer: Mapping[str, Tensor],
        rng: Mapping[str, Tensor],
    ) -> Path:
        """Write one checkpoint, metrics first, then remove those that are not kept. Raises `OSError` if the disk does not take it."""
        state = {
            "format": FORMAT,
            "step": step,
            "threads": torch.get_num_threads(),
            "metrics": self.metrics.flush(),
            "model": file_sha256(self.path / "model.json"),
            "config": config_sha256(config),
        }
        tensors = _parameters(decomposition, importance) | {"optimizer": optimizer, "rng": rng}
        final = write_checkpoint(self.path, tensors, state)
        with contextlib.suppress(OSError):  # one too many does no harm
            prune(self.path, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every)
        return final


@dataclass(frozen=True, repr=False)
class Run(Shown):
    """A run directory opened for reading: the decomposition, γ, metrics, and the task where it can be rebuilt."""

    path: Path
    step: int
    """Steps taken when the loaded checkpoint was written."""
    decomposition: Decomposition
    importance: Importance
    task: Task | None

    @cached_property
    def config(self) -> Config:
        """`config.yaml`; U, V and γ load without it."""
        return load_config(self.path / "config.yaml")

    @property
    def status(self) -> str:
        """running, interrupted, diverged, failed or finished."""
        return self.info["status"]

    @cached_property
    def info(self) -> dict[str, Any]:
        """`run.json`."""
        return read_json(self.path / "run.json")

    @property
    def evaluated_on(self) -> EvaluatedOn:
        """What the evaluations in `metrics.jsonl` looked at; runs of before this was recorded are told by their task."""
        return self.info.get("evaluated_on", self.config.task.evaluated_on)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of `metrics.jsonl`."""
        return read_metrics(self.path)

    @cached_property
    def target_history(self) -> TargetHistory | None:
        """How a toy target was trained; none for any other."""
        return targets.history(read_description(self.path).rebuilt().task, self.path) if (self.path / "target.json").exists() else None

    @cached_property
    @torch.no_grad()
    def verdicts(self) -> tuple[Verdict, ...]:
        """Whether the decomposition can be trusted, from the last evaluation up to the loaded checkpoint; `circuit` has more of them."""
        measured = [line["evaluation"] for line in self.metrics if "evaluation" in line and line["step"] <= self.step]
        left_out = faithfulness(self.decomposition).item()
        now = {"faithfulness": left_out, "faithfulness_relative": left_out / mean_square(self.decomposition)}
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
            "C": f"{described.C} subcomponents a site",
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
        """Add `document` to the list `entries` of `analysis/<name>.json`, in place of one that agrees in the fields `same`.

        Entries of another checkpoint go.
        """
        path = self.path / "analysis" / f"{name}.json"
        before = read_json(path) if path.is_file() else {}
        kept = before[entries] if before.get("step") == self.step else []
        plain = json.loads(json_line(document))
        kept = [each for each in kept if any(each[key] != plain[key] for key in same)]
        return self.save_analysis(name, {"step": self.step, entries: [*kept, plain]})

    def push_to_hub(self, repo: str, **how: Any) -> str:
        """Upload the run directory; `how` and what it raises as for `paramlens.push_to_hub`. Returns the commit's address."""
        return paramlens.push_to_hub(self, repo, **how)

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

    A string user/name that is no path here is a repository on the Hugging Face Hub, fetched at the branch, tag or commit `revision`.
    `model` is the target of a run on your own model, `batches` (as for `decompose`) what its analyses look at; toy targets and their
    data are in the directory, and open on the CPU where the run's device is missing. Raises `RunDirError` if the path is no run,
    holds no checkpoint, needs a model that is not given, or was made from another model.
    """
    path = located(path, revision=revision)
    require_run(path)
    find_checkpoint(path, checkpoint)  # before anything else is missed in a run that has only begun
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


def _whole_checkpoint(path: Path, step: int | None, described: Described) -> Path:
    """The newest checkpoint, or that of `step`, once it is known to be whole and of this run. Raises `RunDirError`.

    One that a run under way removes meanwhile, since it has written newer ones, is given up for those.
    """
    while True:
        folder = find_checkpoint(path, step)
        try:
            require_whole(folder, LOADED)
            require_own(folder, path)
            for name, tensors in described.tensors().items():
                require_fit(folder / f"{name}.safetensors", tensors)
        except RunDirError:
            if folder.is_dir():
                raise
        else:
            return folder


def require_whole_run(path: Path) -> Described:
    """What `model.json` says, once configuration, description and target are as the run's manifest says, and run.json is of this run.

    Runs of the first format have no manifest. Raises `RunDirError` naming the file that differs.
    """
    require_known_format(path)
    require_unchanged(path)
    described = read_description(path)
    if described.format > 1 and not (path / MANIFEST).exists():
        raise RunDirError(f"{path / MANIFEST}: missing; restore the file from a copy")
    given, expected = read_json(path / "run.json").get("target"), described.target.sha256
    if not isinstance(given, dict) or given.get("sha256") != expected:
        raise RunDirError(f"{path / 'run.json'}: target {expected[:12]}… expected, another found; restore the file from a copy")
    return described


def require_unchanged(path: Path) -> None:
    """Raise `RunDirError` naming the first file that is not as the directory's manifest says, where it has one."""
    if (path / MANIFEST).exists() and (found := problems(path, required=("config.yaml",))):
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        raise RunDirError(f"{found[0]}{more}; it has changed since it was written: restore the file from a copy")


def require_target(path: Path, described: Described, model: nn.Module) -> None:
    """Raise `RunDirError` unless `model` has the weights that the run was made from."""
    expected, found = described.target.sha256, model_sha256(model)
    if expected != found:
        raise RunDirError(
            f"{path}: made from {described.target.id} with other weights than this model's "
            f"(sha256 {expected[:12]}… expected, {found[:12]}… found); give the model it was made from"
        )


def build(described: Described, model: nn.Module) -> tuple[Decomposition, Importance]:
    """Decomposition and γ, still empty, as `model.json` describes them. Raises `SiteError` if the model lacks a site."""
    sites = named_sites(model, [site.name for site in described.sites])
    decomposition = Decomposition(model, sites, C=described.C, dtype=getattr(torch, described.dtype))
    return decomposition, described.importance().to(sites[0].W.device)


@torch.no_grad()
def load_parameters(folder: Path, decomposition: Decomposition, importance: Importance) -> None:
    """Copy a checkpoint's U, V and γ in. Raises `RunDirError` naming the tensor that is missing, of another shape or type."""
    for name, tensors in _parameters(decomposition, importance).items():
        copy_into(folder / f"{name}.safetensors", tensors)


def newest_state(path: Path, config: Config) -> CheckpointState | None:
    """State of the newest checkpoint, checked whole and of this very run; none if there is no checkpoint yet. Raises `RunDirError`."""
    if not (found := checkpoints(path)):
        return None
    require_whole(found[-1])
    require_own(found[-1], path)
    state = load_state(found[-1])
    if state.config not in (None, config_sha256(config)):
        raise RunDirError(f"{found[-1]}: of a run with another configuration than {path / 'config.yaml'}; remove it")
    return state


def require_own(folder: Path, path: Path) -> None:
    """Raise `RunDirError` if a checkpoint was written by another run, whole as it may be."""
    model = read_json(folder / "state.json").get("model")
    if model not in (None, file_sha256(path / "model.json")):
        raise RunDirError(f"{folder}: of another run, its state.json names another model.json; remove it, or put the run's own back")


def config_sha256(config: Config) -> str:
    """Hash of a configuration, its number of steps left out."""
    return hashlib.sha256(dump_config(config.model_copy(update={"steps": 1})).encode()).hexdigest()


def model_sha256(model: nn.Module) -> str:
    """Hash of a model's state: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rebuild_task(path: Path, config: Config) -> Task:
    if config.task.given_in_python:
        raise RunDirError(f"{path}: a run on your own model, which the directory does not hold; open_run(path, model=...) from Python")
    kind = torch.device(config.device).type
    if kind != "cpu" and not getattr(torch, kind).is_available():
        config = config.model_copy(update={"device": "cpu"})
    target = targets.load(config, path).to(config.device, config.dtype)
    return config.task.make(target, seed=config.seed, batch=config.batch)


def _parameters(decomposition: Decomposition, importance: Importance) -> dict[str, Mapping[str, Tensor]]:
    """File stem → tensor name → U, V and γ as a checkpoint holds them, as views."""
    U, V = decomposition.U, decomposition.V
    return {
        "components": {f"{name}.U": U[name] for name in U} | {f"{name}.V": V[name] for name in V},
        "importance": named_parameters(importance),
    }


def versions() -> dict[str, str]:
    """Versions that the bytes of a run may depend on."""
    return {"paramlens": paramlens.__version__, "torch": torch.__version__, "python": platform.python_version()}
