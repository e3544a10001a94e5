"""A batch, its present positions, and functions on the nested tensors that models take as inputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from paramlens.kernels.transfer import to_device

Leaf = TypeVar("Leaf")


Inputs = Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]


Batches = Callable[[int], Any] | Sequence[Any] | Iterable[Any]


@dataclass(frozen=True)
class Batch:
    """Inputs of the target, and what is known about their positions.

    inputs: passed to the target as `model(x)`, `model(*sequence)` or `model(**mapping)`; the first axis of tensors is the batch.
    roles: (batch, pos) indices into the task's role names, or None.
    answers: (batch,) token expected after the last position, or None.
    present: (batch, pos), true at a sequence's own positions, false at padding, on either side. Defaults to None: all positions.
    Padding is in no loss, mean or count, and γ does not attend to it.
    texts: the text of each token of every sequence, or None.
    """

    inputs: Inputs
    roles: Tensor | None = None
    answers: Tensor | None = None
    present: Tensor | None = None
    texts: tuple[tuple[str, ...], ...] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        return self.map(lambda tensor: to_device(tensor, device))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` applied to every tensor."""
        return replace(self, **{name: map_tensors(function, getattr(self, name)) for name in ("inputs", "roles", "answers", "present")})

    @property
    def columns(self) -> int | None:
        """Length of the inputs' second axis, which is positions in a batch of sequences. None: the inputs have one axis."""
        return next((tensor.shape[1] for tensor in tensors_of(self.inputs) if tensor.dim() > 1), None)

    @property
    def ends_together(self) -> bool:
        """Whether the last column of the batch is the last position of every sequence."""
        return self.present is None or bool(self.present[:, -1].all())

    @property
    def token_ids(self) -> Int[Tensor, "batch pos"] | None:
        """The token ids, if the inputs are token ids alone or name them `input_ids`. None: other inputs."""
        ids = self.inputs.get("input_ids") if isinstance(self.inputs, Mapping) else self.inputs
        return ids if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() else None

    def with_token_ids(self, ids: Int[Tensor, "batch pos"]) -> "Batch":
        """The same batch with other tokens, without roles, answers and texts."""
        inputs = {**self.inputs, "input_ids": ids} if isinstance(self.inputs, Mapping) else ids
        return replace(self, inputs=inputs, roles=None, answers=None, texts=None)

    def alone(self, row: int) -> "Batch":
        """One sequence of the batch, without padding."""
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
    """Apply `function` to every tensor in nested mappings, tuples and lists; everything else is unchanged."""
    return map_leaves(Tensor, function, tree)


def map_leaves(kind: type[Leaf], function: Callable[[Leaf], Any], tree: Any) -> Any:
    """Apply `function` to every value of type `kind` in nested mappings, (named) tuples and lists; everything else is unchanged."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_leaves(kind, function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [map_leaves(kind, function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor in nested mappings, tuples and lists, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, tree)
    return found


def row_count(inputs: Any) -> int:
    """Number of sequences in a batch: the length of the first tensor's first axis, scalars aside; 1 if there is none."""
    return next((tensor.shape[0] for tensor in tensors_of(inputs) if tensor.dim()), 1)
