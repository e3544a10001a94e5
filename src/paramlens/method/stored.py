"""Tensors that are kept during a run, and a check whether the model wrote to them later in the run."""

from collections.abc import Hashable, Set

from torch import Tensor


class StoredTensors:
    """Inputs and outputs of modules and places in one run, kept without a copy, or as a copy for owners in `copied`."""

    def __init__(self, copied: Set[Hashable]) -> None:
        self._copied = copied
        self._versions: list[tuple[Hashable, Tensor, int]] = []

    def __call__(self, owner: Hashable, tensor: Tensor) -> Tensor:
        """The tensor to keep: `tensor` itself or a copy."""
        if owner in self._copied or tensor.is_inference():  # inference tensors have no version counter
            return tensor.clone()
        self._versions.append((owner, tensor, tensor._version))
        return tensor

    def written(self) -> set[Hashable]:
        """Owners whose kept tensor has been written to since, by PyTorch's version counter: run again, with copies of theirs."""
        return {owner for owner, tensor, version in self._versions if tensor._version != version}
