"""A task: a target model and batches that are a pure function of (seed, stream, step)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from numbers import Integral
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

Leaf = TypeVar("Leaf")

Inputs = Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]
Batches = Callable[[int], Any] | Sequence[Any] | Iterable[Any]
EvaluatedOn = Literal["held-out", "training", "given"]


@dataclass(frozen=True)
class Batch:
    """What the target is run on, and what is known of its positions.

    inputs: passed to the target as `model(x)`, `model(*sequence)` or `model(**mapping)`; tensors lead with the batch axis.
    roles: (batch, pos) indices into the task's role names, or none.
    answers: (batch,) token expected after the last position, or none.
    present: (batch, pos), true at a sequence's own positions, false where it is filled up to the length of the longest, on either side.
    Defaults to all positions. A position that is not present counts nowhere: in no loss, mean or count, and γ does not look at it.
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

    @property
    def columns(self) -> int | None:
        """Length of the second axis of the inputs, positions in a batch of sequences; None for inputs of one axis."""
        return next((tensor.shape[1] for tensor in tensors_of(self.inputs) if tensor.dim() > 1), None)

    @property
    def ends_together(self) -> bool:
        """Whether the last column of the batch is the last position of every sequence."""
        return self.present is None or bool(self.present[:, -1].all())

    @property
    def token_ids(self) -> Int[Tensor, "batch pos"] | None:
        """The tokens, of inputs that are tokens alone or name them `input_ids`; None for any other."""
        ids = self.inputs.get("input_ids") if isinstance(self.inputs, Mapping) else self.inputs
        return ids if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() else None

    def with_token_ids(self, ids: Int[Tensor, "batch pos"]) -> "Batch":
        """The same batch of other tokens, about which nothing else is known."""
        inputs = {**self.inputs, "input_ids": ids} if isinstance(self.inputs, Mapping) else ids
        return replace(self, inputs=inputs, roles=None, answers=None, texts=None)

    def alone(self, row: int) -> "Batch":
        """One sequence of the batch, without what fills it up."""
        assert self.present is not None
        rows, columns, own = *self.present.shape, self.present[row].nonzero()[:, 0]

        def cut(tensor: Tensor) -> Tensor:
            if not tensor.dim() or tensor.shape[0] != rows:
                return tensor
            tensor = tensor[row : row + 1]
            return tensor[:, own.to(tensor.device)] if tensor.dim() > 1 and tensor.shape[1] == columns else tensor

        return replace(self.map(cut), texts=self.texts and self.texts[row : row + 1])


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


def last_positions(present: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch"]:
    """Index of the last present position of every sequence."""
    return present.shape[1] - 1 - present.flip(1).int().argmax(1)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`function` on every tensor of nested mappings, tuples and lists; everything else unchanged."""
    return map_leaves(Tensor, function, tree)


def map_leaves(kind: type[Leaf], function: Callable[[Leaf], Any], tree: Any) -> Any:
    """`function` on every value of a `kind` in nested mappings, tuples (named ones too) and lists; everything else unchanged."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_leaves(kind, function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [map_leaves(kind, function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor of nested mappings, tuples and lists, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, tree)
    return found


def row_count(inputs: Any) -> int:
    """Sequences of a batch: the length of the first axis of the first tensor that has one; 1 where none has."""
    return next((tensor.shape[0] for tensor in tensors_of(inputs) if tensor.dim()), 1)


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator that is a pure function of `key`, such as (seed, "masks", step)."""
    return torch.Generator(device=device).manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """A 63-bit number that is a pure function of `key`; a whole number of NumPy's counts as the same of Python's."""
    key = tuple(int(part) if isinstance(part, Integral) else part for part in key)
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
