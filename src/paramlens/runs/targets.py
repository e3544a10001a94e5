"""The target of a configuration: its shape, its training, its place on disk, and the task around it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paramlens.config.model import Config
from paramlens.errors import ConfigError, RunDirError
from paramlens.files.plain import read_json, sync, write_json
from paramlens.files.tensorfile import copy_into, save_tensors
from paramlens.method.task import TargetHistory, Task
from paramlens.runs.layout import FORMAT
from paramlens.tasks.facts import facts_task, require_different
from paramlens.tasks.induction import InductionTransformer, TargetCheck, induction_task, train_target
from paramlens.tasks.limits import embedding_rows, token_limit
from paramlens.tasks.loading import Language, language_skeleton, load_language, save_language
from paramlens.tasks.miniature import FactsCheck, miniature_model, train_miniature
from paramlens.tasks.settings import CustomTask, FactsTask, InductionTask, TextTask
from paramlens.tasks.text import text_task

FOLDER = "target"
"""Where a run directory keeps a language model that was trained here, as a plain Hugging Face folder."""


@dataclass(frozen=True)
class Target:
    """A target model; history: how it was trained, where that was done here."""

    model: nn.Module
    history: TargetHistory | None = None
    language: Language | None = None

    def to(self, config: Config) -> "Target":
        """The same target where and as `config` says."""
        model = self.model.to(device=config.device, dtype=getattr(torch, config.dtype))
        return dataclasses.replace(self, model=model, language=self.language and dataclasses.replace(self.language, model=model))


def is_trained_here(config: Config) -> bool:
    """Whether the target is a toy that `train-target` makes."""
    return isinstance(config.task, InductionTask) or (isinstance(config.task, FactsTask) and config.task.model is None)


def skeleton(config: Config) -> tuple[nn.Module, int, int]:
    """The target without its weights, the longest sequence of a batch in tokens, and the vocabulary; nothing is trained or loaded.

    A sentence is counted as one token a word and one more where its tokenizer is not at hand. Raises `ConfigError` for a model that
    cannot be found, or that takes fewer tokens.
    """
    task = config.task
    if isinstance(task, InductionTask):
        return _empty(lambda: InductionTransformer(task)), task.length, task.vocabulary + 1
    if isinstance(task, CustomTask):
        raise ConfigError("task: a model of your own is decomposed in Python, paramlens.decompose(model, batches, ...); its task has none")
    if task.model is None:
        if isinstance(task, TextTask):
            raise ConfigError("task.model: give an id on the Hugging Face Hub or a local folder")
        small = task.miniature
        model = _empty(lambda: miniature_model(small, small.vocabulary))
    else:
        model = language_skeleton(task.model, revision=task.revision)
    words = max(len(sentence.split()) + 1 for sentence in task.sentences) if isinstance(task, FactsTask) else task.length
    if (limit := token_limit(model, words)) is not None:
        named = "task.sentences" if isinstance(task, FactsTask) else "task.length"
        raise ConfigError(f"{named}: {words} tokens, and the model takes at most {limit}; give at most that many")
    rows = embedding_rows(model)
    if rows is None:
        raise ConfigError(f"model {task.model}: {type(model).__name__} has no table of tokens; give a language model on tokens")
    return model, words, rows


def _empty(make: Callable[[], nn.Module]) -> nn.Module:
    """A model on the meta device. Raises `ConfigError` for one whose numbers cannot even be counted."""
    try:
        with torch.device("meta"):
            return make()
    except RuntimeError as error:
        raise ConfigError(f"task: the target is larger than any machine's memory ({str(error).splitlines()[0]})") from None


def placed(config: Config, like: Config | None = None) -> Config:
    """The configuration with the paths in its task absolute where something lies there, so that a run can be opened from any folder.

    like: a configuration whose paths are taken as they are where they lead to the same place, or end as a path that leads nowhere here.
    """
    if not isinstance(task := config.task, FactsTask | TextTask):
        return config
    update = dict[str, str]()
    for name in ("model", "source"):
        ours, theirs = (getattr(each.task, name, None) if each else None for each in (config, like))
        if ours is not None:
            update[name] = theirs if theirs is not None and _same_place(ours, theirs) else _absolute(ours)
    return config.model_copy(update={"task": task.model_copy(update=update)})


def _absolute(path: str) -> str:
    """An absolute path of what lies at `path`; `path` itself, which may be an id on the Hub, where nothing does."""
    here = Path(path).expanduser()
    return str(here.resolve()) if here.exists() else path


def _same_place(ours: str, theirs: str) -> bool:
    if _absolute(ours) == _absolute(theirs):
        return True
    own = Path(ours).parts
    return not Path(ours).expanduser().exists() and Path(theirs).is_absolute() and Path(theirs).parts[-len(own) :] == own


def require_sound(config: Config, target: Target) -> None:
    """Raise `ConfigError` if a new run of this configuration could say nothing of its target."""
    if isinstance(config.task, FactsTask) and target.language is not None:
        require_different(config.task, target.language.tokenizer)


def training_steps(config: Config) -> int:
    """Steps that the training of a toy target takes at most in one attempt."""
    task = config.task
    assert isinstance(task, InductionTask | FactsTask)
    return task.training.steps if isinstance(task, InductionTask) else task.miniature.steps


def train(config: Config, *, on_message: Callable[[str], object], on_check: Callable[[int, str], object]) -> Target:
    """Train the toy target of a configuration, telling what it is, its checks (step, and what was found) and whether it converged."""
    task = config.task

    def checked(check: Any) -> None:
        on_check(check.step, _described(check))

    def given_up(attempt: int, last: Any) -> None:
        on_message(f"attempt {attempt} given up at step {last.step}, still at {_described(last)}; another start")

    if isinstance(task, InductionTask):
        on_message(f"training the target: {task.blocks} attention blocks, up to {task.training.steps} steps an attempt")
        how = {"seed": config.seed, "device": config.device}
        model, history = train_target(task, **how, on_check=checked, on_given_up=given_up)
        target, remedy = Target(model, history), "task.training.steps"
    else:
        assert isinstance(task, FactsTask)
        on_message(f"training the target: a GPT-2 of {task.miniature.blocks} blocks, {task.miniature.steps} steps")
        language, history = train_miniature(task.miniature, task.sentences, seed=config.seed, device=config.device, on_check=checked)
        target, remedy = Target(language.model, history, language), "task.miniature.steps"
    last = history.checks[-1]
    half = f"has NOT converged: read what follows as the circuit of a half-trained model, or raise {remedy}"
    attempts = f" in attempt {history.attempts}" if history.attempts > 1 else ""
    on_message(f"target {'converged' if history.converged else half}{attempts} at step {last.step}: {_described(last)}")
    return target


def _described(check: Any) -> str:
    shared = f"loss {check.loss:.2e} nats  accuracy {check.accuracy:.4f}"
    if isinstance(check, FactsCheck):
        return f"{shared}  probability {check.probability:.3f}"
    return f"{shared}  attention m→s1 {check.attention_m_s1:.3f}  s2→m {check.attention_s2_m:.3f}"


def save(target: Target, path: Path) -> None:
    """A target trained here: a language model as a Hugging Face folder, any other in `target.safetensors`; its training: `target.json`."""
    assert target.history is not None
    if target.language is not None:
        save_language(target.model, target.language.tokenizer, path / FOLDER)
        for file in (path / FOLDER).iterdir():
            sync(file)
    else:
        save_tensors(path / "target.safetensors", target.model.state_dict())
    write_json(path / "target.json", {"format": FORMAT, **dataclasses.asdict(target.history)})


def load(config: Config, path: Path) -> Target:
    """The target of a run directory, or of one that `train-target` made. Raises `RunDirError` if it is missing or of another shape."""
    task = config.task
    if isinstance(task, InductionTask):
        file = path / "target.safetensors"
        model = InductionTransformer(task)
        if not file.is_file():
            raise RunDirError(f"{path}: no target.safetensors; give a directory made by train-target or decompose")
        copy_into(file, model.state_dict())
        return Target(model, _history(path, TargetCheck))
    if is_trained_here(config):
        if not (path / FOLDER).is_dir():
            raise RunDirError(f"{path}: no folder {FOLDER}; give a directory made by train-target or decompose")
        language = load_language(str(path / FOLDER))
        return Target(language.model, _history(path, FactsCheck), language)
    return pretrained(config)


def pretrained(config: Config) -> Target:
    """The language model that a configuration names."""
    task = config.task
    assert isinstance(task, FactsTask | TextTask)
    if task.model is None:
        raise ConfigError("task.model: give an id on the Hugging Face Hub or a local folder")
    language = load_language(task.model, revision=task.revision, dtype=getattr(torch, config.dtype))
    return Target(language.model, language=language)


def history(path: Path) -> TargetHistory:
    """How the toy target of a directory was trained."""
    checks = read_json(path / "target.json")["checks"]
    return _history(path, FactsCheck if "probability" in checks[0] else TargetCheck)


def _history(path: Path, kind: type[Any]) -> TargetHistory:
    document = read_json(path / "target.json")
    checks = tuple(kind(**check) for check in document["checks"])
    return TargetHistory(checks, converged=document["converged"], attempts=document["attempts"])


def make_task(config: Config, target: Target) -> Task:
    """The task around a target."""
    task = config.task
    if isinstance(task, InductionTask):
        assert isinstance(target.model, InductionTransformer)
        return induction_task(task, target.model, seed=config.seed, batch=config.batch)
    assert target.language is not None
    if isinstance(task, FactsTask):
        return facts_task(task, target.language, seed=config.seed)
    assert isinstance(task, TextTask)
    return text_task(task, target.language, seed=config.seed, batch=config.batch)


def identity(config: Config, target: Target) -> dict[str, Any]:
    """What run.json says of where a target came from."""
    if target.history is not None:
        return {"id": f"{config.name} toy target"}
    assert target.language is not None
    return {"id": target.language.name, "revision": target.language.revision}
