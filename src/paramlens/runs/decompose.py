"""From a model or a configuration to a finished run directory: `decompose` and `decompose_config`."""

import dataclasses
import inspect
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from paramlens.config.file import load_config, make_config
from paramlens.config.model import Config
from paramlens.errors import ConfigError, RunDirError, SiteError
from paramlens.fields import differences, expand_home
from paramlens.files.lock import locked
from paramlens.kernels.machine import machine
from paramlens.kernels.openmp import SPINNING, waiting
from paramlens.kernels.resources import usable_cores
from paramlens.method.batch import Batches, Inputs
from paramlens.method.decomposition import Decomposition
from paramlens.method.entry import require_plain, require_sound
from paramlens.method.generators import generator
from paramlens.method.importance.kind import kind_class
from paramlens.method.importance.network import Importance
from paramlens.method.losses.faithfulness import faithfulness
from paramlens.method.modes import buffers_kept, default_modes
from paramlens.method.padding import require_padding_unseen
from paramlens.method.sites import at_rest, find_sites
from paramlens.method.start import initialise, out_of_reach, subcomponents
from paramlens.method.task import Task
from paramlens.runs import targets
from paramlens.runs.budget import Footprint, footprint, require_memory
from paramlens.runs.forecast import require_room
from paramlens.runs.integrity import model_sha256, newest_state, require_unchanged
from paramlens.runs.layout import checkpoint_path, default_out, holds_toy
from paramlens.runs.randomness import seeded
from paramlens.runs.resume import begin, recorded_threads, reopen
from paramlens.runs.rundir import Run, open_run
from paramlens.runs.saving import require_space
from paramlens.runs.target_training import require_device, trained_target
from paramlens.runs.train import Learner, restore, train
from paramlens.runs.writer import RunWriter
from paramlens.tasks.base import BaseTask, Target
from paramlens.tasks.batches import own_task
from paramlens.tracking.tracker import Tracker
from paramlens.tracking.trackers import as_tracker


@default_modes()
def decompose(
    model: nn.Module,
    batches: Batches,
    *,
    held_out: Batches | None = None,
    elsewhere: Batches | None = None,
    sites: str | Sequence[str] = ("*",),
    C: int | Literal["auto"] = 64,
    steps: int = 1000,
    out: str | Path | None = None,
    resume: bool = False,
    extend_steps: int | None = None,
    overwrite: bool = False,
    tracker: Tracker | str | Sequence[str] | None = None,
    **fields: Any,
) -> Run:
    """Decompose any `nn.Module` that maps a batch to logits (a tensor, or an output with `.logits`).

    batches: a function of the step, a sequence (cycled), or an iterable (restarted at its end; such a run cannot be resumed).
    A batch is passed as `model(x)`, `model(*sequence)` or `model(**mapping)`; the first axis of tensors is the batch. What `forward`
    does not take (labels, the y of (x, y) pairs) is left out. If sequences differ in length, an `attention_mask` (batch, pos), as
    tokenizers make it, or a `paramlens.Batch` says which positions are present. Other positions are ignored.
    held_out: batches for evaluations and analyses, which are not decomposed, in the same forms (of an iterable, the first 64 are used).
    None: evaluations and analyses use `batches`, and results say "training".
    elsewhere: batches of other data for `losses.elsewhere`, in the same forms: they are not decomposed, and what is found must not matter
    there. Give both or neither.
    out: the run directory. Defaults to a new temporary directory. fields: any field of `Config`, as in `optim={"lr": 3e-3}`.
    resume: continue the run in `out` from its newest checkpoint. The result has the same bytes as a run that never stopped.
    extend_steps: continue to this number of steps, if the run so far does not depend on the number of steps.
    tracker: a `Tracker`, or names of `trackers.LIBRARIES`, which are used together with the terminal. Defaults to no tracker.
    The model is not changed. Raises `ConfigError`, `SiteError`, `BatchError`, `RunDirError`, `DivergedError`, `SaveError`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: an nn.Module is needed, not {type(model).__name__}")
    require_plain(model)
    if "task" in fields:
        raise ConfigError("task: belongs to configurations; a model of your own comes with its batches")
    device = str(next((parameter.device for parameter in model.parameters()), "cpu"))
    if fields.get("device", device) != device:
        raise ConfigError(f"device {fields['device']}: the model is on {device}; move the model, or leave device out")
    if not isinstance(sites, Iterable):
        raise ConfigError(f"sites: {sites!r}; give patterns of module paths, such as '*' for every weight matrix")
    tree = {"device": device, **fields, "sites": [sites] if isinstance(sites, str) else list(sites), "C": C, "steps": steps}
    config = make_config(tree, source="decompose")
    if bool(config.losses.elsewhere) != (elsewhere is not None):
        raise ConfigError("elsewhere: batches of other data and a coefficient losses.elsewhere go together; give both or neither")
    task = dataclasses.replace(own_task(model, batches, held_out=held_out, elsewhere=elsewhere), last_token=_last_logits(model))
    for name, given in (("batches", batches), ("held_out", held_out), ("elsewhere", elsewhere)):
        if resume and given is not None and not (callable(given) or isinstance(given, Sequence)):
            raise ConfigError(f"resume: {name} from an iterable cannot be taken up at a step; give a function of the step or a sequence")
    follower = as_tracker(tracker)
    path = Path(tempfile.mkdtemp(prefix="paramlens-") if out is None else expand_home(str(out)))
    path = path.absolute()  # batches may change the directory
    config = begin(config, path, resume=resume, extend_steps=extend_steps, overwrite=overwrite)
    with locked(path):
        return _run(config, task, path, Target(model), resume=resume, overwrite=overwrite, tracker=follower)


def _last_logits(model: nn.Module) -> Callable[[Inputs], Inputs] | None:
    """A function that adds `logits_to_keep` to inputs, so that a Hugging Face model computes only the last logits. None: not supported."""
    names = list(inspect.signature(model.forward).parameters)
    if "logits_to_keep" not in names:
        return None

    def last(inputs: Inputs) -> Inputs:
        if isinstance(inputs, Mapping):
            return {**inputs, "logits_to_keep": 1}
        given = inputs if isinstance(inputs, tuple | list) else (inputs,)
        return {**dict(zip(names, given, strict=False)), "logits_to_keep": 1}

    return last


@default_modes()
def decompose_config(
    config: Config,
    *,
    out: str | Path | None = None,
    target: str | Path | None = None,
    resume: bool = False,
    extend_steps: int | None = None,
    overwrite: bool = False,
    tracker: Tracker | str | Sequence[str] | None = None,
) -> Run:
    """Run a configuration. A toy target is trained first, unless `target` is a directory with a trained one.

    target: for language models, also a Hugging Face Hub id or a local folder of any model.
    out: the run directory. Defaults to runs/<name>-s<seed>. resume, extend_steps, tracker: as for `decompose`, as are the errors.
    """
    target = None if target is None else expand_home(str(target))
    follower, named = as_tracker(tracker), with_target(config, target)
    if named is not config:
        config, target = named, None
    config = targets.with_absolute_paths(config)
    if resume and target is not None:
        raise ConfigError(f"target {target}: a resumed run has its target; leave one of target and resume out")
    require_device(config.device)
    path = Path(expand_home(str(out))) if out is not None else default_out(config)
    config = begin(config, path, resume=resume, extend_steps=extend_steps, overwrite=overwrite)
    require_room(config)
    with locked(path):
        source = path if resume and config.task.trained_here else None if target is None else Path(target)
        found = _target(config, source, tracker=follower).to(config.device, config.dtype)
        if not resume:
            config.task.require_sound(found)
        task = config.task.make(found, seed=config.seed, batch=config.batch)
        return _run(config, task, path, found, resume=resume, overwrite=overwrite, tracker=follower)


def _target(config: Config, source: Path | None, *, tracker: Tracker) -> Target:
    """The target of a configuration: pretrained, from the directory `source`, or trained now."""
    if not config.task.trained_here:
        return config.task.pretrained(config.dtype)
    if source is None:
        return trained_target(config, tracker=tracker)
    require_unchanged(source)
    _require_same_task(config.task, source)
    return targets.load(config, source)


def with_target(config: Config, target: str | Path | None) -> Config:
    """`config` with `target` as its language model, or unchanged if `target` is a directory with a toy target."""
    if target is None or holds_toy(Path(target)):
        return config
    task = config.task.with_model(str(target))
    return config if task is config.task else config.model_copy(update={"task": task})


def _require_same_task(task: BaseTask, source: Path) -> None:
    """Raise `ConfigError` unless the target in `source` was trained on the same task. Its weights do not show, for example, its heads."""
    if not (source / "config.yaml").is_file():
        raise RunDirError(f"{source}: no config.yaml; give a directory made by train-target or decompose")
    if task.how_trained is None:
        return
    saved, given = ({"task": each.model_dump(exclude=set(task.how_trained))} for each in (load_config(source / "config.yaml").task, task))
    if changed := differences(saved, given):
        raise ConfigError(f"target {source}: trained on another task ({'; '.join(changed)}); give its values or train another")


def _run(
    config: Config,
    task: Task,
    path: Path,
    target: Target,
    *,
    resume: bool,
    overwrite: bool,
    tracker: Tracker,
) -> Run:
    """Train `task` and write the run to `path`. All user errors are found before a directory is made or replaced."""
    state = newest_state(path) if resume else None
    threads = config.threads or recorded_threads(path, state)
    with (
        machine(config.model_copy(update={"threads": threads})),
        at_rest(task.model),
        torch.enable_grad(),
        seeded(config.seed, config.device),
    ):
        with buffers_kept(task.model):
            decomposition, importance = _built(config, task)
        learner = Learner(config, decomposition, importance)
        start = 0 if state is None else state.step
        require_space(path, config.checkpoint, decomposition, importance, start=start, steps=config.steps)
        identity = target.identity(config.name) | {"sha256": model_sha256(task.model)}
        if resume:
            directory = reopen(config, path, state, decomposition, importance, tracker=tracker)
        else:
            directory = RunWriter.create(path, config, overwrite=overwrite)
            if target.history is not None:
                targets.save(config.task, target, path)
            directory.record(device=config.device, dtype=config.dtype, matmul=config.matmul, seed=config.seed, target=identity, seconds=0.0)
            directory.describe(config, decomposition, importance, identity)
        if state is None:
            if missed := out_of_reach(decomposition):
                tracker.message(missed)
            _start_values(config, decomposition, importance)
        else:
            restore(checkpoint_path(path, start), state, learner)
        if start == config.steps:
            tracker.message(f"{path}: already finished at step {start}")
        else:
            if (used := torch.get_num_threads()) > 1 and waiting() == "spinning":
                tracker.message(SPINNING.format(threads=used))
            how = {"threads": used, "cores": usable_cores(), "waiting": waiting()}
            directory.record(status="running", evaluated_on=task.evaluated_on, **how)
            train(config, task, learner, directory, start=start, tracker=tracker)
    return dataclasses.replace(open_run(path, model=task.model), task=task)


def _built(config: Config, task: Task) -> tuple[Decomposition, Importance]:
    dtype = getattr(torch, config.dtype)
    sites = find_sites(task.model, config.sites)
    if not any(site.W.any() for site in sites):
        raise SiteError(f"sites {', '.join(config.sites)}: every weight is 0, so there is nothing to decompose; load the model's weights")
    for site in sites:
        if site.W.dtype != dtype:
            raise ConfigError(f"dtype {config.dtype}: site {site.name} is {site.W.dtype}; convert the model or change dtype")
        if kind_class(config.gamma.kind).reads_inner and site.d_seen != site.d_in:
            raise ConfigError(
                f"gamma.kind {config.gamma.kind}: at the embedding {site.name}, x @ U is the same wherever a token stands and cannot be "
                "read from what γ sees of it; give gamma.kind vector, shared or attention"
            )
    first = task.batch(0, "train").to(config.device)
    inputs = first.inputs
    size = footprint(task.model, sites, inputs, last=task.last_token is not None)
    if size is not None:  # before large tensors are made
        require_memory(config, sites, size)
    C = subcomponents(config.C, sites)
    decomposition = Decomposition(task.model, sites, C=C, dtype=dtype, delta=config.delta)
    target = require_sound(decomposition, inputs)
    if config.last_token_only and target.logits.dim() != 3:
        raise ConfigError(
            f"last_token_only true: the model's logits {tuple(target.logits.shape)} have no position axis (batch, pos, token); give false"
        )
    require_padding_unseen(task.model, first, target.logits)
    decomposition.find_blocks(inputs)
    longest = max(value.shape[1] for value in target.inputs.values())
    if size is None:
        require_memory(config, sites, Footprint(target.logits.shape[0], longest, target.logits.shape[-1]))
    known = task.longest if task.longest is not None and first.columns == longest else longest
    importance = Importance({site.name: (site.d_seen, C) for site in sites}, config.gamma, max_length=max(known, longest))
    importance = importance.to(device=config.device, dtype=dtype)
    with torch.no_grad():
        importance(target.seen, decomposition.U, first.present)
    return decomposition, importance


def _start_values(config: Config, decomposition: Decomposition, importance: Importance) -> None:
    """Set the initial values of U, V and γ, and do the faithfulness-only warm-up if `init.warmup_steps` is above 0."""
    initialise(decomposition, config.init, generator=generator(config.seed, "init"))
    importance.initialise(generator(config.seed, "gamma"))
    optimizer = torch.optim.Adam(decomposition.parameters(), lr=config.init.warmup_lr)
    for _ in range(config.init.warmup_steps):
        optimizer.zero_grad()
        faithfulness(decomposition).backward()
        optimizer.step()
