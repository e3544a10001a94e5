"""From a model or a configuration to a finished run directory: `decompose` and `decompose_config`."""

import dataclasses
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paramlens import targets
from paramlens.budget import require_memory
from paramlens.config import Config, CustomTask, FactsTask, InductionTask, TextTask
from paramlens.configfile import load_config, make_config
from paramlens.decomposition import Decomposition, Plan, TargetRun, initialise
from paramlens.errors import BatchError, ConfigError, DivergedError, RunDirError, SiteError
from paramlens.importance import Importance
from paramlens.layout import checkpoints, default_out, holds_toy, require_free
from paramlens.losses import faithfulness
from paramlens.machine import machine
from paramlens.masks import Replacement
from paramlens.rundir import Run, RunDirectory, model_sha256, open_run
from paramlens.sites import at_rest, find_sites
from paramlens.targets import Target
from paramlens.tasks import Batches, Inputs, Task, batch_function, generator
from paramlens.tracking import Silent, Tracker
from paramlens.train import make_optimizer, restore, train


def decompose(
    model: nn.Module,
    batches: Batches,
    *,
    sites: str | Sequence[str] = ("*",),
    C: int = 64,
    steps: int = 1000,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tracker: Tracker | None = None,
    **fields: Any,
) -> Run:
    """Decompose any `nn.Module` that maps a batch to logits (a tensor, or an output with `.logits`).

    batches: a function of the step, a sequence (cycled), or an iterable (iterated anew when exhausted; such a run cannot be resumed).
    A batch is passed as `model(x)`, `model(*sequence)` or `model(**mapping)`; tensors lead with the batch axis.
    out: the run directory; none: a new temporary one. fields: any field of `Config`, nested ones as mappings (`optim={"lr": 3e-3}`).
    The model comes back exactly as it was. Raises `ConfigError`, `SiteError`, `BatchError`, `RunDirError`, `DivergedError`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: an nn.Module is needed, not {type(model).__name__}")
    if "task" in fields:
        raise ConfigError("task: belongs to configurations; a model of your own comes with its batches")
    device = str(next((parameter.device for parameter in model.parameters()), "cpu"))
    if fields.get("device", device) != device:
        raise ConfigError(f"device {fields['device']}: the model is on {device}; move the model, or leave device out")
    tree = {"device": device, **fields, "sites": [sites] if isinstance(sites, str) else list(sites), "C": C, "steps": steps}
    config = make_config(tree, source="decompose")
    task = Task(model=model, batch=batch_function(batches), last_token=_last_logits(model))
    if resume and not (callable(batches) or isinstance(batches, Sequence)):
        raise ConfigError("resume: batches from an iterable cannot be taken up at a step; give a function of the step or a sequence")
    path = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="paramlens-"))
    if resume:
        _require_resumable(config, path, overwrite=overwrite)
    return _run(config, task, path, resume=resume, overwrite=overwrite, tracker=tracker or Silent())


def _last_logits(model: nn.Module) -> Callable[[Inputs], Inputs] | None:
    """Inputs that make a Hugging Face language model unembed its last position alone, by its own argument for it."""
    names = list(inspect.signature(model.forward).parameters)
    if "logits_to_keep" not in names:
        return None

    def last(inputs: Inputs) -> Inputs:
        if isinstance(inputs, Mapping):
            return {**inputs, "logits_to_keep": 1}
        given = inputs if isinstance(inputs, tuple | list) else (inputs,)
        return {**dict(zip(names, given, strict=False)), "logits_to_keep": 1}

    return last


def decompose_config(
    config: Config,
    *,
    out: str | Path | None = None,
    target: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tracker: Tracker | None = None,
) -> Run:
    """The run that a configuration describes, its toy target trained first unless `target` names a directory that holds one.

    target: for language models also any model, an id on the Hugging Face Hub or a local folder.
    out: the run directory; none: runs/<name>-s<seed>. Raises as `decompose` does.
    """
    tracker, named = tracker or Silent(), with_target(config, target)
    if named is not config:
        config, target = named, None
    if isinstance(config.task, CustomTask):
        raise ConfigError("task: give one of a kind; a model of your own is decomposed in Python, paramlens.decompose(model, batches, ...)")
    if resume and target is not None:
        raise ConfigError(f"target {target}: a resumed run has its target; leave one of --target and --resume out")
    _require_device(config.device)
    path = Path(out) if out is not None else default_out(config)
    made_here = targets.is_trained_here(config)
    if resume:
        _require_resumable(config, path, overwrite=overwrite)
        source = path if made_here else None
    else:
        require_free(path, overwrite=overwrite)
        source = None if target is None else Path(target)
    if made_here:
        find_sites(targets.skeleton(config)[0], config.sites)
    if not made_here:
        found = targets.pretrained(config)
    elif source is None:
        with machine(config):
            found = trained_target(config, tracker=tracker)
    else:
        _require_same_task(config.task, source)
        found = targets.load(config, source)
    found = found.to(config)
    return _run(config, targets.make_task(config, found), path, resume=resume, overwrite=overwrite, tracker=tracker, target=found)


def with_target(config: Config, target: str | Path | None) -> Config:
    """`config`, its language model replaced by `target` unless that is a directory in which a toy target lies."""
    if target is None or isinstance(config.task, InductionTask | CustomTask) or holds_toy(Path(target)):
        return config
    return config.model_copy(update={"task": config.task.model_copy(update={"model": str(target), "revision": None})})


def trained_target(config: Config, *, tracker: Tracker) -> Target:
    """Train the toy target of a configuration, telling its progress and whether it converged."""
    _require_device(config.device)
    return targets.train(config, on_message=tracker.message)


def _require_resumable(config: Config, path: Path, *, overwrite: bool) -> None:
    """Raise unless `path` holds a checkpoint of a run with this very configuration, and nobody asks to replace it."""
    if overwrite:
        raise ConfigError("resume and overwrite exclude each other; leave one out")
    if not (path / "config.yaml").is_file():
        raise RunDirError(f"{path}: nothing to resume there; leave --resume out to start anew")
    saved = load_config(path / "config.yaml")
    ours, theirs = _leaves(config.model_dump()), _leaves(saved.model_dump())
    changed = [f"{name} {theirs.get(name)!r} → {ours.get(name)!r}" for name in ours if ours[name] != theirs.get(name)]
    if changed:
        raise ConfigError(
            f"{path}: was started with another configuration ({'; '.join(changed)}); resume with the same one or give another --out"
        )
    if not checkpoints(path):
        raise RunDirError(f"{path}: holds no finished checkpoint to resume from; --overwrite starts anew")


def _require_same_task(task: InductionTask | FactsTask | TextTask, source: Path) -> None:
    """Raise unless the target in `source` was trained on this very task; heads, say, leave no trace in its weights."""
    if not (source / "config.yaml").is_file():
        raise RunDirError(f"{source}: no config.yaml; give a directory made by train-target or decompose")
    if not isinstance(task, InductionTask):
        return  # a language model's folder says what it is
    starts = {"training", "embedding_scale", "position_scale", "position_offset"}  # how it was trained, not what it is
    ours, theirs = (_leaves(each.model_dump(exclude=starts)) for each in (task, load_config(source / "config.yaml").task))
    changed = [f"task.{name} {theirs.get(name)!r} → {ours[name]!r}" for name in ours if ours[name] != theirs.get(name)]
    if changed:
        raise ConfigError(f"target {source}: trained on another task ({'; '.join(changed)}); give its values or train another")


def _require_same_target(directory: RunDirectory, model: nn.Module) -> None:
    info = directory.info
    if info["target"]["sha256"] != model_sha256(model):
        raise RunDirError(
            f"{directory.path}: made from {info['target']['id']} with other weights than this model's; resume with the same model"
        )


def _require_device(device: str) -> None:
    kind = torch.device(device).type
    if kind != "cpu" and not getattr(torch, kind).is_available():
        raise ConfigError(f"device {device}: torch {torch.__version__} finds none here; give cpu")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def _run(
    config: Config,
    task: Task,
    path: Path,
    *,
    resume: bool,
    overwrite: bool,
    tracker: Tracker,
    target: Target | None = None,
) -> Run:
    """Train `task` into `path`. Everything that a user can get wrong is checked before a directory is made or replaced."""
    with machine(config), at_rest(task.model), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        decomposition, importance = _built(config, task)
        optimizer = make_optimizer(config, decomposition, importance)
        if resume:
            directory = RunDirectory(path)
            _require_same_target(directory, task.model)
            start = restore(checkpoints(path)[-1], decomposition, importance, optimizer)
            directory.cut_metrics(start)
        else:
            directory = RunDirectory.create(path, config, overwrite=overwrite)
            start = 0
            _start_values(config, decomposition, importance)
            if target is not None and target.history is not None:
                targets.save(target, path)
            directory.describe(decomposition, importance)
            identity = targets.identity(config, target) if target is not None else {"id": type(task.model).__qualname__}
            identity["sha256"] = model_sha256(task.model)
            directory.record(device=config.device, dtype=config.dtype, matmul=config.matmul, seed=config.seed, target=identity, seconds=0.0)
        if start == config.steps:
            tracker.message(f"{path}: already finished at step {start}")
        else:
            directory.record(status="running", threads=torch.get_num_threads())
            train(config, task, decomposition, importance, optimizer, directory, start=start, tracker=tracker)
    return dataclasses.replace(open_run(path, model=task.model), task=task)


def _built(config: Config, task: Task) -> tuple[Decomposition, Importance]:
    dtype = getattr(torch, config.dtype)
    sites = find_sites(task.model, config.sites)
    for site in sites:
        if site.W.dtype != dtype:
            raise ConfigError(f"dtype {config.dtype}: site {site.name} is {site.W.dtype}; convert the model or change dtype")
    decomposition = Decomposition(task.model, sites, C=config.C, dtype=dtype)
    inputs = task.batch(0, "train").to(config.device).inputs
    target = decomposition.target_run(inputs)
    if not torch.isfinite(target.logits).all():
        raise DivergedError("the target's logits on the first batch are not finite; check the model and the batch")
    if config.last_token_only and target.logits.dim() != 3:
        raise ConfigError(
            f"last_token_only true: the model's logits {tuple(target.logits.shape)} have no position axis (batch, pos, token); give false"
        )
    _require_stackable(decomposition, inputs, target)
    decomposition.find_blocks(inputs)
    longest = max(value.shape[1] for value in target.inputs.values())
    require_memory(config, sites, length=longest, vocabulary=target.logits.shape[-1])
    max_length = config.task.length if isinstance(config.task, InductionTask | TextTask) else longest
    importance = Importance({site.name: (site.d_in, config.C) for site in sites}, config.gamma, max_length=max_length)
    importance = importance.to(device=config.device, dtype=dtype)
    with torch.no_grad():
        importance(target.inputs, decomposition.U)
    return decomposition, importance


def _require_stackable(decomposition: Decomposition, inputs: Inputs, target: TargetRun) -> None:
    """Raise unless all sites share their leading axes and plans stacked along the batch give what each gives alone."""
    shapes = {name: tuple(value.shape[:-1]) for name, value in target.inputs.items()}
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise SiteError(f"sites {first} and {name}: inputs lead with {shapes[first]} and {shape}; decompose them in runs of their own")
    off = {name: Replacement(U.new_zeros(*shapes[name], decomposition.C)) for name, U in decomposition.U.items()}
    plans: list[Plan] = [off, {}]
    advice = "every tensor of a batch must lead with the batch axis, and so must what each site is given"
    with torch.no_grad():
        try:
            stacked = decomposition.masked_run(inputs, plans)
        except RuntimeError as error:
            raise BatchError(f"the model fails on plans stacked along the batch ({str(error).splitlines()[0]}); {advice}") from None
        for plan, logits in zip(plans, stacked, strict=True):
            if not torch.allclose(logits, decomposition.masked_run(inputs, [plan])[0], rtol=1e-2, atol=1e-3):
                raise BatchError(f"plans stacked along the batch differ from single ones; {advice}")


def _start_values(config: Config, decomposition: Decomposition, importance: Importance) -> None:
    """Starting point of U, V and γ, with the faithfulness-only warm-up where the configuration asks for one."""
    initialise(decomposition, config.init, generator=generator(config.seed, "init"))
    importance.initialise(generator(config.seed, "gamma"))
    optimizer = torch.optim.Adam(decomposition.parameters(), lr=config.init.warmup_lr)
    for _ in range(config.init.warmup_steps):
        optimizer.zero_grad()
        faithfulness(decomposition).backward()
        optimizer.step()
