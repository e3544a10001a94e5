"""The caller's own batches: the forms they can have, and which of their positions are present."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paramlens.errors import BatchError, ConfigError
from paramlens.method.batch import Batch, Batches, Inputs, map_leaves, tensors_of
from paramlens.method.task import EvaluatedOn, Task

MASK = "attention_mask"
"""The tokenizers' name for the mask of present positions: (batch, pos), 1 for present and 0 for padding."""

LABELS = ("labels", "label", "label_ids")
"""Inputs that data collators add for the model's own loss, which is not used here."""

CACHES = ("past_key_values", "cache_params")
"""Caches of text generation. The model writes into them, so a second pass of the same batch would give another result."""

_FORMS = "give a tensor, a tuple or mapping of tensors (as the model is called), a dataclass of them, or a paramlens.Batch"


HELD_OUT = 64
"""Number of held-out batches taken from an iterable, which is read once, before the run."""


def own_task(
    model: nn.Module,
    batches: Batches,
    *,
    held_out: Batches | None = None,
    elsewhere: Batches | None = None,
    evaluated_on: EvaluatedOn = "training",
) -> Task:
    """The task of the caller's own model.

    held_out: batches for evaluations and analyses, in the same forms as `batches`; of an iterable, the first `HELD_OUT` are used. None:
    they use `batches`, and `evaluated_on` says what these are. elsewhere: batches of the second stream, in the same forms.
    Raises `ConfigError` and `BatchError` for what is not a series of batches.
    """
    train, looked_at = batch_function(batches, model), batches
    other = train
    if held_out is not None:
        looked_at = held_out if callable(held_out) or isinstance(held_out, Tensor | Mapping | str | Batch | Sequence) else _first(held_out)
        other, evaluated_on = batch_function(looked_at, model, name="held_out"), "held-out"
    second = None if elsewhere is None else batch_function(elsewhere, model, name="elsewhere")
    return Task(
        model,
        lambda step, stream: train(step, stream) if stream == "train" else other(step, stream),
        longest=max(longest_of(batches, train) or 0, longest_of(looked_at, other) or 0) or None,
        held_out=len(looked_at) if isinstance(looked_at, Sequence) else None,
        evaluated_on=evaluated_on,
        elsewhere=None if second is None else lambda step: second(step, "train"),
    )


def _first(batches: Iterable[Any]) -> list[Any]:
    return list(itertools.islice(batches, HELD_OUT)) if isinstance(batches, Iterable) else batches


def batch_function(batches: Batches, model: nn.Module, *, name: str = "batches") -> Callable[[int, str], Batch]:
    """A task's function of (step, stream), made from a function of the step, a sequence (cycled), or an iterable (restarted at its end).

    Held-out streams get the same batches. name: name of the argument in messages. Raises `ConfigError` and `BatchError` for anything else.
    """
    if isinstance(batches, Tensor | Mapping | str | Batch) or not (callable(batches) or isinstance(batches, Iterable)):
        raise ConfigError(
            f"{name}: {type(batches).__name__} is not a series of batches; give a list of batches, a function of the step, or a DataLoader"
        )
    form = BatchForm(model)
    if callable(batches):
        return lambda step, _: form(batches(step), f"batch of step {step}")
    if isinstance(batches, Sequence):
        if not len(batches):
            raise BatchError(f"{name}: an empty sequence; give at least one batch")
        return lambda step, _: form(batches[step % len(batches)], f"batch {step % len(batches)}")
    endless = _repeated(batches)
    first = next(endless)
    return lambda step, stream: form(next(endless) if stream == "train" and step > 0 else first, f"batch of step {step}")


def longest_of(batches: Batches, batch: Callable[[int, str], Batch]) -> int | None:
    """Columns of the longest batch of a sequence of batches. None for other forms, whose batches are not all known before the run."""
    if not isinstance(batches, Sequence):
        return None
    return max((batch(step, "train").columns or 0 for step in range(len(batches))), default=0) or None


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise BatchError(
                "batches: the iterable is exhausted; give one that can be iterated again, a sequence, or a function of the step"
            )


class BatchForm:
    """Turns the caller's batch into a `Batch` that fits the signature of the model's `forward`.

    * A tensor or a NumPy array: the model is called as `model(x)`.
    * A tuple, list or namedtuple: `model(*batch)`, without the items for which `forward` has no argument, such as the y of (x, y) pairs.
    * A mapping or dataclass: `model(**batch)`, without labels and without names that `forward` does not know.
    * A `Batch` is used as it is.
    * If `attention_mask` (batch, pos) is among the inputs, by name or by position, it says which positions are present.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = list(inspect.signature(model.forward).parameters.values())
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.names = [each.name for each in parameters if each.kind in named]
        self.required = {each.name for each in parameters if each.default is inspect.Parameter.empty}
        self.takes_any_name = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
        places = [each for each in parameters if each.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        takes_any = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters)
        self.places = None if takes_any else len(places)

    def __call__(self, given: Any, place: str) -> Batch:
        """Make the `Batch`. Raises `BatchError`, whose message names `place`, what was given and what to give."""
        if isinstance(given, Batch):
            return dataclasses.replace(given, present=_present(given.present, place))
        inputs = map_leaves(np.ndarray, torch.as_tensor, self._inputs(given, place))
        tensors = tensors_of(inputs)
        if not tensors:
            raise BatchError(f"{place}: {_described(given)} holds no tensor; {_FORMS}")
        if any(tensor.is_meta for tensor in tensors):
            raise BatchError(f"{place}: is on the meta device, without values; make the batch on the model's device")
        if not all(tensor.numel() for tensor in tensors if tensor.dim()):
            raise BatchError(f"{place}: is empty, its tensors are {', '.join(str(tuple(each.shape)) for each in tensors)}; leave it out")
        mask = inputs.get(MASK) if isinstance(inputs, Mapping) else None
        return Batch(inputs, present=_present(mask, place) if isinstance(mask, Tensor) and mask.dim() == 2 else None)

    def _inputs(self, given: Any, place: str) -> Inputs:
        if isinstance(given, Tensor | np.ndarray):
            return given  # pyright: ignore[reportReturnType]  # arrays become tensors next
        if dataclasses.is_dataclass(given) and not isinstance(given, type | Mapping):
            given = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
        if isinstance(given, Mapping):
            if cached := [name for name in CACHES if given.get(name) is not None]:
                raise BatchError(f"{place}: {cached[0]} is a cache, which the model writes into; leave it out and give whole sequences")
            return {name: value for name, value in given.items() if self._takes(str(name))}
        if isinstance(given, tuple | list):
            if given and all(isinstance(each, int | float | str) for each in given):
                raise BatchError(
                    f"{place}: a {type(given).__name__} of {type(given[0]).__name__}; give tokens as torch.tensor (batch, pos)"
                )
            taken = tuple(given[: self.places])
            return dict(zip(self.names, taken, strict=False)) if MASK in self.names[: len(taken)] else taken
        raise BatchError(f"{place}: {_described(given)} is not a batch; {_FORMS}")

    def _takes(self, name: str) -> bool:
        known = name in self.names or self.takes_any_name
        return known and (name not in LABELS or name in self.required)


def _described(given: Any) -> str:
    return "None" if given is None else f"an object of type {type(given).__name__}"


def _present(mask: Tensor | None, place: str) -> Tensor | None:
    """The mask as booleans. None: all positions are present."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise BatchError(f"{place}: the mask of present positions is {tuple(mask.shape)}; give (batch, pos)")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise BatchError(f"{place}: {MASK} holds other numbers than 0 and 1; it says which positions of (batch, pos) are present")
    present = mask.bool()
    if not bool(present.any(1).all()):
        row = int((~present.any(1)).nonzero()[0])
        raise BatchError(f"{place}: sequence {row} has no present position in {MASK}; leave it out")
    return None if bool(present.all()) else present
