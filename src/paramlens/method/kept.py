"""Tensors that are kept while a model runs on, although some models write to them later in the run."""

from collections.abc import Hashable, Set

from torch import Tensor


class Kept:
    """What modules and sites' places are given or return in one run, kept as it is, or as a copy for those in `copied`."""

    def __init__(self, copied: Set[Hashable]) -> None:
        self._copied = copied
        self._versions: list[tuple[Hashable, Tensor, int]] = []

    def __call__(self, owner: Hashable, tensor: Tensor) -> Tensor:
        """What to keep of `tensor`."""
        if owner in self._copied or tensor.is_inference():  # those count no versions
            return tensor.clone()
        self._versions.append((owner, tensor, tensor._version))
        return tensor

    def written(self) -> set[Hashable]:
        """Owners of a kept tensor that has been written to since, by PyTorch's own count: a run with copies of theirs is due."""
        return {owner for owner, tensor, version in self._versions if tensor._version != version}
