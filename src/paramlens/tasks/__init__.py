"""A task: a target model and batches that are a pure function of (seed, stream, step)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from paramlens.errors import BatchError, ConfigError

Inputs = Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]
Batches = Callable[[int], Inputs] | Sequence[Inputs] | Iterable[Inputs]


@dataclass(frozen=True)
class Batch:
    """What the target is run on, and what is known of its positions.

    inputs: passed to the target as `model(x)`, `model(*sequence)` or `model(**mapping)`; tensors lead with the batch axis.
    roles: (batch, pos) indices into the task's role names, or none.
    answers: (batch,) token expected after the last position, or none.
    present: (batch, pos), true at a sequence's own positions, which come first, false where it is filled up to the length of the
    longest; none: everywhere. What is not present counts nowhere.
    texts: of every sequence the text of its tokens, or none.
    """

    inputs: Inputs
    roles: Tensor | None = None
    answers: Tensor | None = None
    present: Tensor | None = None
    texts: tuple[tuple[str, ...], ...] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """`function` on every tensor."""
        return replace(self, **{name: map_tensors(function, getattr(self, name)) for name in ("inputs", "roles", "answers", "present")})


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
    tokenizer: Any = None
    """Of a language model; none for any other."""
    token_names: tuple[str, ...] = ()
    """Of a model on tokens without a tokenizer: their names by number, where numbers would say less."""
    held_out: int | None = None
    """Batches that a held-out stream has before it repeats; none: without end."""
    last_token: Callable[[Inputs], Inputs] | None = None
    """Inputs that make the target compute the logits of the last position only, where it can."""

    def loss_inputs(self, inputs: Inputs, *, last_token_only: bool) -> Inputs:
        """What a masked run is given: all that the loss needs of `inputs`, and no more where the target allows it."""
        return self.last_token(inputs) if last_token_only and self.last_token is not None else inputs


def batch_function(batches: Batches) -> Callable[[int, str], Batch]:
    """The caller's own batches as a task's: a function of the step, a sequence (cycled), or an iterable (iterated anew when exhausted).

    Held-out streams see the same batches: the caller has no others.
    """
    if isinstance(batches, Tensor | Mapping | str) or not (callable(batches) or isinstance(batches, Iterable)):
        raise ConfigError(
            f"batches: {type(batches).__name__} is one batch or none; give a list of batches, a function of the step, or a DataLoader"
        )
    if callable(batches):
        return lambda step, _: Batch(batches(step))
    if isinstance(batches, Sequence):
        if not len(batches):
            raise BatchError("batches: an empty sequence; give at least one batch")
        return lambda step, _: Batch(batches[step % len(batches)])
    endless = _repeated(batches)
    first = next(endless)
    return lambda step, stream: Batch(next(endless) if stream == "train" and step > 0 else first)


def _repeated(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise BatchError(
                "batches: the iterable is exhausted; give one that can be iterated again, a sequence, or a function of the step"
            )


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`function` on every tensor of nested mappings, tuples and lists; everything else unchanged."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor of nested mappings, tuples and lists, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, tree)
    return found


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator that is a pure function of `key`, such as (seed, "masks", step)."""
    return torch.Generator(device=device).manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """A 63-bit number that is a pure function of `key`."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
