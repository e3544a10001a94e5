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
    """The training of a target: the checks of the last attempt in order, whether it converged, and the number of attempts."""

    checks: tuple[Any, ...]
    """Dataclasses with `step`, `loss`, `accuracy` and whatever else the task measures."""
    converged: bool
    attempts: int = 1


@dataclass(frozen=True)
class Link:
    """Attention that a task's circuit needs: in `pattern`, from the query with one role to the key with another."""

    name: str
    pattern: str
    query: str
    key: str


@dataclass(frozen=True)
class Task:
    """A target and its data: `batch(step, stream)` returns a batch; streams ("train", "evaluate") are independent."""

    model: nn.Module
    batch: Callable[[int, str], Batch]
    roles: tuple[str, ...] = ()
    attention_patterns: tuple[str, ...] = ()
    """Modules of the target whose output is an attention pattern (batch, head, query, key); its rows sum to 1."""
    links: tuple[Link, ...] = ()
    changes: Mapping[str, Callable[[Batch], AbstractContextManager[None]]] = field(default_factory=dict)
    """Name → a function that changes the target's runs on a batch, inside the context that it returns."""
    elsewhere: Callable[[int], Batch] | None = None
    """Step → a batch of the second stream, which is not decomposed: other data, on which `losses.elsewhere` is taken."""
    other_inputs: Callable[[int], tuple[str, Batch] | None] | None = None
    """Count → a name for, and at most that many, other inputs of the same kind, which are not decomposed. None: tokens are shuffled."""
    tokenizer: Any = None
    """Tokenizer of a language model. None: another kind of model."""
    token_names: tuple[str, ...] = ()
    """Names of the tokens by id, for a model without a tokenizer. Defaults to their numbers."""
    longest: int | None = None
    """Number of columns of the longest batch. None: not known in advance."""
    held_out: int | None = None
    """Number of batches in a held-out stream before it repeats. None: it never repeats."""
    evaluated_on: EvaluatedOn = "held-out"
    """The batches of all streams but "train": held out from training, the training batches, or those given to `open_run`."""
    last_token: Callable[[Inputs], Inputs] | None = None
    """Changes inputs so that the target computes logits of the last position only. None: the target cannot."""

    def loss_inputs(self, batch: Batch, *, last_token_only: bool) -> Inputs:
        """The inputs of a masked run: without logits that the loss does not need, if the target can leave them out."""
        if last_token_only and self.last_token is not None and batch.ends_together:
            return self.last_token(batch.inputs)
        return batch.inputs
