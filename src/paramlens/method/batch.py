"""A batch, its present positions, and the trees of tensors that models take."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Leaf = TypeVar("Leaf")


Inputs = Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]


Batches = Callable[[int], Any] | Sequence[Any] | Iterable[Any]


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
