"""The interface of a task: a section of the configuration that also makes the target and the batches.

To add a task, write a subclass of `BaseTask` in a file of its own in this folder and add the class to `registry.py`. A task whose target
is trained here defines its fields with a `kind`, defines `network`, `skeleton`, `training_plan`, `train` and `make`, and sets
`trained_here`. A task on language models subclasses `PretrainedTask` instead and defines `skeleton` and `make`. Flags, messages, `doctor`,
the run directory, the analyses and the page then support the task. The other methods and attributes have defaults.

Configurations are checked without torch, so a task imports torch, and every module that needs torch, inside its methods.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from paramlens.errors import ConfigError, RunDirError, first_line
from paramlens.fields import Section

if TYPE_CHECKING:
    from torch import nn

    from paramlens.method.batch import Inputs
    from paramlens.method.task import TargetHistory, Task

FILE = "target.safetensors"
"""File of a run directory with the weights of a target that was trained here."""

FOLDER = "target"
"""Folder of a run directory with a language model that was trained here, in the format of Hugging Face."""


@dataclass(frozen=True)
class Target:
    """A target model, where it comes from, and its training history if it was trained here."""

    model: "nn.Module"
    tokenizer: Any = None
    """Tokenizer of a language model. None for other models."""
    name: str | None = None
    """Hugging Face Hub id or local folder of a pretrained model. None for other models."""
    revision: str | None = None
    """Commit on the Hub from which the model was loaded."""
    history: "TargetHistory | None" = None

    def to(self, device: str, dtype: str) -> "Target":
        """The same target on a device, with weights of the type `dtype`, such as "float32"."""
        import torch

        return dataclasses.replace(self, model=self.model.to(device=device, dtype=getattr(torch, dtype)))

    def identity(self, run: str) -> dict[str, Any]:
        """Where the target comes from, for run.json. run: name of the configuration that trained it."""
        if self.history is not None:
            return {"id": f"{run} toy target"}
        return {"id": type(self.model).__qualname__} if self.name is None else {"id": self.name, "revision": self.revision}


@dataclass(frozen=True)
class TargetCheck:
    """A measurement of a target during its training. A task can add measurements in a subclass."""

    step: int
    loss: float
    """Cross-entropy, nats."""
    accuracy: float
    """Share of correct answers, in [0, 1]."""

    def __str__(self) -> str:
        return f"loss {self.loss:.2e} nats  accuracy {self.accuracy:.4f}"


OnCheck = Callable[[TargetCheck], object]
OnGivenUp = Callable[[int, TargetCheck], object]


@dataclass(frozen=True)
class TrainingPlan:
    """How a target will be trained, for messages, progress and the memory check."""

    what: str
    """What is trained and for how long, as text for messages."""
    steps: int
    """Maximum number of steps of one attempt."""
    steps_field: str
    """Field of the configuration that sets `steps`."""
    batch: int
    """Sequences per step."""
    batch_field: str
    """Field of the configuration that sets `batch`."""
    bytes: int
    """Memory of the activations and logits of one step, in bytes."""


@dataclass(frozen=True)
class Skeleton:
    """A target without weights, on the meta device, and the size of its batches."""

    model: "nn.Module"
    inputs: "Inputs"
    """Inputs of the model for one sequence, on the meta device."""
    rows: int
    """Sequences in a batch."""
    length: int
    """Length of the longest sequence of a batch, in tokens."""
    vocabulary: int
    """Size of the logits' last dimension."""
    last_token: bool = False
    """Whether the target can compute the logits of the last position alone."""


class BaseTask(Section):
    """Base class of all tasks. Its fields are the section `task` of a configuration; `kind: Literal[...]` selects the class."""

    given_in_python: ClassVar[bool] = False
    """Whether the model and the batches are Python objects of the caller, which no file can describe."""
    evaluated_on: ClassVar[Literal["held-out", "training"]] = "held-out"
    """The batches that evaluations and analyses use, for runs that have not recorded it."""
    batch_field: ClassVar[str] = "batch"
    """The name, in messages, of what sets the number of sequences in a batch."""
    paths: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that hold a path or a Hub id."""
    check: ClassVar[type[TargetCheck]] = TargetCheck
    """The class of the measurements during the target's training."""
    how_trained: ClassVar[frozenset[str] | None] = frozenset()
    """Names of the fields that set how the target is trained, not what it is. None: the target's own files describe it."""

    @property
    def trained_here(self) -> bool:
        """Whether `train-target` and `decompose` train the target. Defaults to False."""
        return False

    def skeleton(self, *, batch: int) -> Skeleton:
        """The target's shape and the size of its batches, without training the target, loading weights or sampling batches.

        batch: the field `batch` of the configuration. Raises `ConfigError` if the target is not found or cannot take such long sequences.
        """
        raise NotImplementedError

    def make(self, target: Target, *, seed: int, batch: int) -> "Task":
        """The task of a target: its batches as a function of (seed, stream, step), their roles, and what analyses may need."""
        raise NotImplementedError

    # For tasks whose target is trained here

    def network(self) -> "nn.Module":
        """The target with random weights from PyTorch's global generator."""
        raise NotImplementedError

    def training_plan(self) -> TrainingPlan:
        """How `train` will train the target."""
        raise NotImplementedError

    def train(self, *, seed: int, device: str, on_check: OnCheck, on_given_up: OnGivenUp) -> Target:
        """Train the target and return it with its history, even if it has not converged.

        on_check: called with every measurement. on_given_up: called with the number and the last measurement of each failed attempt that
        is followed by another. Raises `DivergedError` if the loss is not finite.
        """
        raise NotImplementedError

    def save(self, target: Target, path: Path) -> None:
        """Write the trained target into a directory. Defaults to its state dict in `target.safetensors`."""
        from paramlens.files.tensorfile import save_tensors

        save_tensors(path / FILE, target.model.state_dict())

    def load(self, path: Path) -> Target:
        """Read what `save` wrote. Raises `RunDirError` if it is missing or has other shapes."""
        from paramlens.files.tensorfile import copy_into

        if not (path / FILE).is_file():
            raise RunDirError(f"{path}: no {FILE}; give a directory made by train-target or decompose")
        model = self.network()
        copy_into(path / FILE, model.state_dict())
        return Target(model)

    # For tasks on a pretrained model

    def pretrained(self, dtype: str) -> Target:
        """Load the model that the configuration names. dtype: of its weights, such as "float32". Raises `ConfigError` if that fails."""
        raise NotImplementedError

    def with_model(self, name: str) -> "BaseTask":
        """This task with another pretrained model. Defaults to the task unchanged, for tasks that take no such model."""
        return self

    # What the rest of the library needs, with defaults that hold for most tasks

    @property
    def longest(self) -> int | None:
        """Length of the longest batch, in tokens. Defaults to None: it does not follow from the fields."""
        return None

    @property
    def own_sentences(self) -> tuple[str, ...]:
        """The sentences that are decomposed, for analyses of single sentences. Defaults to no sentences."""
        return ()

    @property
    def has_elsewhere(self) -> bool:
        """Whether every step also has a batch of a second stream, which is not decomposed, for `losses.elsewhere`.

        Defaults to whether the task has a field `elsewhere` and it is above 0.
        """
        return getattr(self, "elsewhere", 0) > 0

    @property
    def adds_positions_after_projection(self) -> bool:
        """Whether position encodings are added to queries and keys, which are then not 0 where their sites output 0."""
        return False

    def require_sound(self, target: Target) -> None:
        """Raise `ConfigError` if a new run could not give a meaningful result for this target."""

    def with_absolute_paths(self, like: "BaseTask | None" = None) -> Self:
        """This task with absolute paths for files that exist, so that a run can be opened from any folder.

        like: a task whose path is used instead if it is the same file, or if it ends with our path and our path does not exist here.
        """
        update: dict[str, str] = {}
        for name in self.paths:
            ours, theirs = getattr(self, name), getattr(like, name, None)
            if ours is not None:
                update[name] = theirs if theirs is not None and _same_place(ours, theirs) else _absolute(ours)
        return self.model_copy(update=update)


def on_meta(make: "Callable[[], nn.Module]") -> "nn.Module":
    """The model that `make` builds, on the meta device. Raises `ConfigError` if the model is too large even for that."""
    import torch

    try:
        with torch.device("meta"):
            return make()
    except RuntimeError as error:
        raise ConfigError(f"task: the target is larger than any machine's memory ({first_line(error)})") from None


def _absolute(path: str) -> str:
    """The absolute path if `path` exists; otherwise `path` itself, which may be a Hub id."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _same_place(ours: str, theirs: str) -> bool:
    if _absolute(ours) == _absolute(theirs):
        return True
    own = Path(ours).parts
    return not Path(ours).exists() and Path(theirs).is_absolute() and Path(theirs).parts[-len(own) :] == own
