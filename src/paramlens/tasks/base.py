"""What a task is: one section of the configuration, which also makes its target and its batches.

To add a task, put a subclass of `BaseTask` into a file of its own in this folder, and that class into `registry.py`. A task whose target
is trained here writes the fields of its configuration with a `kind`, and the methods `network`, `skeleton`, `training_plan`, `train` and
`make`, and sets `trained_here`; a task on language models subclasses `PretrainedTask` instead and writes `skeleton` and `make`. Flags,
messages, `doctor`, the run directory, the analyses and the page then know the task. The other methods and attributes have defaults.

A configuration is read and refused without torch, so a task imports torch, and every module that needs it, inside its methods.
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
"""Where a run directory keeps the weights of a target that was trained here."""

FOLDER = "target"
"""Where a run directory keeps a language model that was trained here, as a plain Hugging Face folder."""


@dataclass(frozen=True)
class Target:
    """A target model, where it comes from, and how it was trained if that was done here."""

    model: "nn.Module"
    tokenizer: Any = None
    """Of a language model."""
    name: str | None = None
    """Id on the Hugging Face Hub, or local folder, of a pretrained model."""
    revision: str | None = None
    """Commit on the Hub that the model was loaded from."""
    history: "TargetHistory | None" = None

    def to(self, device: str, dtype: str) -> "Target":
        """The same target on a device, its weights of a type such as "float32"."""
        import torch

        return dataclasses.replace(self, model=self.model.to(device=device, dtype=getattr(torch, dtype)))

    def identity(self, run: str) -> dict[str, Any]:
        """What run.json says of where the target comes from. run: name of the configuration that trained it."""
        if self.history is not None:
            return {"id": f"{run} toy target"}
        return {"id": type(self.model).__qualname__} if self.name is None else {"id": self.name, "revision": self.revision}


@dataclass(frozen=True)
class TargetCheck:
    """A measurement of a target that is being trained; a task may measure more in a subclass."""

    step: int
    loss: float
    """Cross-entropy, nats."""
    accuracy: float
    """Share of answers that are right, in [0, 1]."""

    def __str__(self) -> str:
        return f"loss {self.loss:.2e} nats  accuracy {self.accuracy:.4f}"


OnCheck = Callable[[TargetCheck], object]
OnGivenUp = Callable[[int, TargetCheck], object]


@dataclass(frozen=True)
class TrainingPlan:
    """How a target is going to be trained, for messages, progress and the check of memory."""

    what: str
    """What is trained and for how long, as a message says it."""
    steps: int
    """Steps of one attempt, at most."""
    steps_field: str
    """Field of the configuration that sets `steps`."""
    batch: int
    """Sequences per step."""
    batch_field: str
    """Field of the configuration that sets `batch`."""
    bytes: int
    """Memory that the activations and logits of one step take."""


@dataclass(frozen=True)
class Skeleton:
    """A target without its weights, on the meta device, and the size of its batches."""

    model: "nn.Module"
    inputs: "Inputs"
    """One sequence as the model is called with it, on the meta device."""
    rows: int
    """Sequences in a batch."""
    length: int
    """Longest sequence of a batch, in tokens."""
    vocabulary: int
    """Classes of the logits."""
    last_token: bool = False
    """Whether the target can be asked for the logits of the last position alone."""


class BaseTask(Section):
    """What every task answers. Its fields are the section `task` of a configuration; `kind: Literal[...]` tells them apart."""

    given_in_python: ClassVar[bool] = False
    """Whether model and batches are the caller's own objects, which no file holds."""
    evaluated_on: ClassVar[Literal["held-out", "training"]] = "held-out"
    """What evaluations and analyses look at, of runs that have not recorded it."""
    batch_field: ClassVar[str] = "batch"
    """What sets the number of sequences in a batch, as messages call it."""
    paths: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that hold a path, or an id on the Hub."""
    check: ClassVar[type[TargetCheck]] = TargetCheck
    """What the training of the target measures."""
    how_trained: ClassVar[frozenset[str] | None] = frozenset()
    """Names of the fields that say how the target is trained and not what it is. None if the target's own files say what it is."""

    @property
    def trained_here(self) -> bool:
        """Whether the target is a toy that `train-target` and `decompose` train. Defaults to False."""
        return False

    def skeleton(self, *, batch: int) -> Skeleton:
        """The target's shape and the size of its batches, found without training, loading or drawing anything.

        batch: the field `batch` of the configuration. Raises `ConfigError` for a target that cannot be found or takes fewer tokens.
        """
        raise NotImplementedError

    def make(self, target: Target, *, seed: int, batch: int) -> "Task":
        """The task around a target: batches as a function of (seed, stream, step), roles, and what else analyses can ask for."""
        raise NotImplementedError

    # Of a task whose target is trained here

    def network(self) -> "nn.Module":
        """The target with random weights, drawn from PyTorch's global generator."""
        raise NotImplementedError

    def training_plan(self) -> TrainingPlan:
        """How `train` is going to train the target."""
        raise NotImplementedError

    def train(self, *, seed: int, device: str, on_check: OnCheck, on_given_up: OnGivenUp) -> Target:
        """Train the target and return it with its history. A target that has not converged is returned as well.

        on_check: is given every measurement. on_given_up: is given the number and the last measurement of an attempt that failed, if
        another one follows. Raises `DivergedError` if the loss is not finite.
        """
        raise NotImplementedError

    def save(self, target: Target, path: Path) -> None:
        """Write the trained target into a directory. Defaults to its state dict in `target.safetensors`."""
        from paramlens.files.tensorfile import save_tensors

        save_tensors(path / FILE, target.model.state_dict())

    def load(self, path: Path) -> Target:
        """Read what `save` wrote. Raises `RunDirError` if it is missing or of another shape."""
        from paramlens.files.tensorfile import copy_into

        if not (path / FILE).is_file():
            raise RunDirError(f"{path}: no {FILE}; give a directory made by train-target or decompose")
        model = self.network()
        copy_into(path / FILE, model.state_dict())
        return Target(model)

    # Of a task on a pretrained model

    def pretrained(self, dtype: str) -> Target:
        """The model that the configuration names, its weights of a type such as "float32". Raises `ConfigError` if it cannot be loaded."""
        raise NotImplementedError

    def with_model(self, name: str) -> "BaseTask":
        """This task on another pretrained model. Defaults to the task as it is, for one that takes none."""
        return self

    # What the rest of the library asks, with answers that hold for most tasks

    @property
    def longest(self) -> int | None:
        """Tokens of the longest batch. Defaults to None: the fields do not tell it."""
        return None

    @property
    def own_sentences(self) -> tuple[str, ...]:
        """Sentences that are decomposed, for analyses that look at sentences one by one. Defaults to none."""
        return ()

    @property
    def has_elsewhere(self) -> bool:
        """Whether every step also has other text, which is not decomposed, for `losses.elsewhere`."""
        return False

    @property
    def adds_positions_after_projection(self) -> bool:
        """Whether position encodings are added to queries and keys, so that these are not 0 where their sites write 0."""
        return False

    def require_sound(self, target: Target) -> None:
        """Raise `ConfigError` if a new run could say nothing of this target."""

    def placed(self, like: "BaseTask | None" = None) -> Self:
        """This task with absolute paths where something lies at them, so that a run can be opened from any folder.

        like: a task whose paths are taken as they are where they lead to the same place, or end as a path that leads nowhere here.
        """
        update: dict[str, str] = {}
        for name in self.paths:
            ours, theirs = getattr(self, name), getattr(like, name, None)
            if ours is not None:
                update[name] = theirs if theirs is not None and _same_place(ours, theirs) else _absolute(ours)
        return self.model_copy(update=update)


def on_meta(make: "Callable[[], nn.Module]") -> "nn.Module":
    """The model that `make` makes, on the meta device. Raises `ConfigError` for one whose numbers cannot even be counted."""
    import torch

    try:
        with torch.device("meta"):
            return make()
    except RuntimeError as error:
        raise ConfigError(f"task: the target is larger than any machine's memory ({first_line(error)})") from None


def _absolute(path: str) -> str:
    """An absolute path of what lies at `path`; `path` itself, which may be an id on the Hub, where nothing does."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _same_place(ours: str, theirs: str) -> bool:
    if _absolute(ours) == _absolute(theirs):
        return True
    own = Path(ours).parts
    return not Path(ours).exists() and Path(theirs).is_absolute() and Path(theirs).parts[-len(own) :] == own
