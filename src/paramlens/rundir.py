"""The run directory: the only bridge between training and everything after it.

    config.yaml   resolved, runnable again          run.json   versions, device, dtype, threads, seed, target, status, seconds
    model.json    format, sites, shapes, γ: all that loading needs
    metrics.jsonl one line per logged step           target.safetensors, target.json   toy targets: weights, training checks
    target/       a language model that was trained here, as a plain Hugging Face folder
    checkpoints/step-00002000/{components, importance, optimizer, rng}.safetensors, state.json, MANIFEST.json
    analysis/*.json                                  report.html

A checkpoint is written beside its place as `.part`, synced, and renamed: a directory without that ending is finished.
"""

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paramlens
from paramlens import targets
from paramlens.config import Config, CustomTask, Gamma
from paramlens.configfile import dump_config, load_config
from paramlens.decomposition import Decomposition
from paramlens.errors import RunDirError
from paramlens.importance import Importance
from paramlens.layout import (
    FORMAT,
    checkpoint_path,
    checkpoint_step,
    checkpoints,
    clear,
    file_sha256,
    find_checkpoint,
    read_json,
    read_metrics,
    require_free,
    require_run,
    sync,
    write_json,
    write_text,
)
from paramlens.sites import find_sites
from paramlens.tasks import Batches, TargetHistory, Task, batch_function
from paramlens.tensorfile import copy_into, load_tensors


@dataclass(frozen=True)
class CheckpointState:
    """All that resuming needs beside U, V and γ."""

    step: int
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]


class RunDirectory:
    """The writing side of a run directory; one writer per run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | Path, config: Config, *, overwrite: bool = False) -> "RunDirectory":
        """A new directory holding `config.yaml` and `run.json`. Raises `RunDirError` as `layout.require_free` does."""
        path = Path(path)
        require_free(path, overwrite=overwrite)
        try:
            clear(path)
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / "config.yaml", dump_config(config))
            write_json(path / "run.json", {"format": FORMAT, "versions": _versions()})
        except OSError as error:
            raise RunDirError(f"{path}: cannot be written ({error.strerror}); give another --out") from None
        return cls(path)

    def describe(self, decomposition: Decomposition, importance: Importance) -> None:
        """Write `model.json`."""
        gamma = importance.gamma
        lengths = {group.max_length for group in importance.typed_groups}
        model = {
            "format": FORMAT,
            "C": decomposition.C,
            "dtype": str(decomposition._U[0].dtype).removeprefix("torch."),
            "sites": [{"name": site.name, "d_in": site.d_in, "d_out": site.d_out} for site in decomposition.sites],
            "gamma": {"kind": gamma.kind, "d_gate": gamma.d_gate, "relative": gamma.relative, "max_length": lengths.pop()},
        }
        write_json(self.path / "model.json", model)

    @property
    def info(self) -> dict[str, Any]:
        """`run.json`."""
        return read_json(self.path / "run.json")

    def record(self, **fields: Any) -> None:
        """Add fields to `run.json`."""
        write_json(self.path / "run.json", self.info | fields)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drop lines after `step`."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def save_checkpoint(self, decomposition: Decomposition, importance: Importance, state: CheckpointState, *, keep_last: int) -> Path:
        """Write one checkpoint, then remove all but the newest `keep_last`."""
        final = checkpoint_path(self.path, state.step)
        part = final.with_name(final.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        contents = _parameters(decomposition, importance) | {"optimizer": state.optimizer, "rng": state.rng}
        for name, tensors in contents.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part / f"{name}.safetensors")
        write_json(part / "state.json", {"format": FORMAT, "step": state.step})
        files = sorted(part.iterdir())
        write_json(part / "MANIFEST.json", {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in files})
        for file in (*files, part):
            sync(file)
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        sync(final.parent)
        for old in checkpoints(self.path)[:-keep_last]:
            shutil.rmtree(old)
        return final


@dataclass(frozen=True)
class Run:
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

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of `metrics.jsonl`."""
        return read_metrics(self.path)

    @cached_property
    def target_history(self) -> TargetHistory | None:
        """How a toy target was trained; none for any other."""
        return targets.history(self.path) if (self.path / "target.json").exists() else None

    def keep_analysis(self, name: str, entries: str, document: Mapping[str, Any], *, same: Sequence[str]) -> Path:
        """Add `document` to the list `entries` of `analysis/<name>.json`, in place of one that agrees in the fields `same`.

        Entries of another checkpoint go.
        """
        path = self.path / "analysis" / f"{name}.json"
        before = read_json(path) if path.is_file() else {}
        kept = before[entries] if before.get("step") == self.step else []
        plain = json.loads(json.dumps(document))
        kept = [each for each in kept if any(each[key] != plain[key] for key in same)]
        return self.save_analysis(name, {"step": self.step, entries: [*kept, plain]})

    def save_analysis(self, name: str, document: Mapping[str, Any]) -> Path:
        """Write `analysis/<name>.json`."""
        path = self.path / "analysis" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, document)
        return path


def open_run(path: str | Path, *, model: nn.Module | None = None, batches: Batches | None = None, checkpoint: int | None = None) -> Run:
    """Open a run directory at its newest checkpoint, or at step `checkpoint`.

    `model` is the target of a run on your own model, `batches` (as for `decompose`) what its analyses look at; toy targets and their
    data are in the directory, and open on the CPU where the run's device is missing. Raises `RunDirError` if the path is no run,
    holds no checkpoint, needs a model that is not given, or was made from another model.
    """
    path = Path(path)
    require_run(path)
    described = read_json(path / "model.json")
    if described["format"] > FORMAT:
        raise RunDirError(f"{path}: written in format {described['format']}, this version reads up to {FORMAT}; upgrade paramlens")
    task = None
    if model is None:
        task = _rebuild_task(path, load_config(path / "config.yaml"))
        model = task.model
    elif batches is not None:
        task = Task(model, batch_function(batches))
    info = read_json(path / "run.json")
    if info["target"]["sha256"] != model_sha256(model):
        raise RunDirError(f"{path}: made from {info['target']['id']} with other weights than this model's; give the model it was made from")
    folder = find_checkpoint(path, checkpoint)
    decomposition, importance = build(described, model)
    load_parameters(folder, decomposition, importance)
    return Run(path, checkpoint_step(folder), decomposition, importance, task)


def build(described: Mapping[str, Any], model: nn.Module) -> tuple[Decomposition, Importance]:
    """Decomposition and γ, still empty, as `model.json` describes them. Raises `SiteError` if the model lacks a site."""
    sites = find_sites(model, [site["name"] for site in described["sites"]])
    dtype = getattr(torch, described["dtype"])
    gamma = {key: value for key, value in described["gamma"].items() if key != "max_length"}
    decomposition = Decomposition(model, sites, C=described["C"], dtype=dtype)
    shapes = {site.name: (site.d_in, described["C"]) for site in sites}
    importance = Importance(shapes, Gamma(**gamma), max_length=described["gamma"]["max_length"])
    return decomposition, importance.to(device=sites[0].W.device, dtype=dtype)


@torch.no_grad()
def load_parameters(folder: Path, decomposition: Decomposition, importance: Importance) -> None:
    """Copy a checkpoint's U, V and γ in. Raises `RunDirError` naming the tensor that is missing or of another shape."""
    for name, tensors in _parameters(decomposition, importance).items():
        copy_into(folder / f"{name}.safetensors", tensors)


def load_state(folder: Path) -> CheckpointState:
    return CheckpointState(
        step=checkpoint_step(folder),
        optimizer=load_tensors(folder / "optimizer.safetensors"),
        rng=load_tensors(folder / "rng.safetensors"),
    )


def model_sha256(model: nn.Module) -> str:
    """Hash of a model's state: names, shapes, types and bytes."""
    digest = sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rebuild_task(path: Path, config: Config) -> Task:
    if isinstance(config.task, CustomTask):
        raise RunDirError(f"{path}: a run on your own model, which the directory does not hold; open_run(path, model=...) from Python")
    kind = torch.device(config.device).type
    if kind != "cpu" and not getattr(torch, kind).is_available():
        config = config.model_copy(update={"device": "cpu"})
    return targets.make_task(config, targets.load(config, path).to(config))


def _parameters(decomposition: Decomposition, importance: Importance) -> dict[str, dict[str, Tensor]]:
    """File stem → tensor name → U, V and γ as a checkpoint holds them, as views."""
    U, V = decomposition.U, decomposition.V
    return {
        "components": {f"{name}.U": U[name] for name in U} | {f"{name}.V": V[name] for name in V},
        "importance": {f"{name}.{key}": value for name, parts in importance.site_parameters().items() for key, value in parts.items()},
    }


def _versions() -> dict[str, str]:
    return {"paramlens": paramlens.__version__, "torch": torch.__version__, "python": platform.python_version()}
