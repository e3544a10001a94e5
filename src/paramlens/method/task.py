"""A task: a target model and batches that are a pure function of (seed, stream, step)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from paramlens.method.batch import Batch, Inputs

EvaluatedOn = Literal["held-out", "training", "given"]


@dataclass(frozen=True)
class TargetHistory:
    """The training of a target: the checks of its last attempt in order, attempts made, and whether that one converged."""

    checks: tuple[Any, ...]
    """Dataclasses with `step`, `loss` and `accuracy`, and what else the task measures."""
    converged: bool
    attempts: int = 1


@dataclass(frozen=True)
class Link:
    """Attention that a task's circuit rests on: in `pattern`, from the one query of a role to the one key of another."""

    name: str
    pattern: str
    query: str
    key: str


@dataclass(frozen=True)
class Task:
    """A target and its data. `batch(step, stream)`: streams are independent ("train", "evaluate")."""

    model: nn.Module
    batch: Callable[[int, str], Batch]
    roles: tuple[str, ...] = ()
    attention_patterns: tuple[str, ...] = ()
    """Modules of the target whose output is an attention pattern (batch, head, query, key), rows summing to 1."""
    links: tuple[Link, ...] = ()
    changes: Mapping[str, Callable[[Batch], AbstractContextManager[None]]] = field(default_factory=dict)
    """Name → a change of the target's run on a batch, in force inside the context."""
    elsewhere: Callable[[int], Batch] | None = None
    """Step → other text, which is not decomposed, and on which what is a sentence's own must not matter."""
    other_inputs: Callable[[int], tuple[str, Batch] | None] | None = None
    """Count → what they are, and at most so many inputs of the same kind that are not decomposed. Defaults to None: tokens are shuffled."""
    tokenizer: Any = None
    """Of a language model; none for any other."""
    token_names: tuple[str, ...] = ()
    """Of a model on tokens without a tokenizer: their names by number, where numbers would say less."""
    longest: int | None = None
    """Columns of its longest batch; None where that is not known beforehand."""
    held_out: int | None = None
    """Batches that a held-out stream has before it repeats; none: without end."""
    evaluated_on: EvaluatedOn = "held-out"
    """What all streams but "train" hold: batches kept from training, the training batches themselves, or what `open_run` was given."""
    last_token: Callable[[Inputs], Inputs] | None = None
    """Inputs that make the target compute the logits of the last position only, where it can."""

    def loss_inputs(self, batch: Batch, *, last_token_only: bool) -> Inputs:
        """What a masked run is given: all that the loss needs of the batch, and no more where the target allows it."""
        if last_token_only and self.last_token is not None and batch.ends_together:
            return self.last_token(batch.inputs)
        return batch.inputs
