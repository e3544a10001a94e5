"""Tensors that are kept while a model runs on, although some models write to them later in the run."""

from collections.abc import Set

from torch import Tensor, nn


class Kept:
    """What modules are given or return in one run, kept as it is, or as a copy of the modules in `copied`."""

    def __init__(self, copied: Set[nn.Module]) -> None:
        self._copied = copied
        self._versions: list[tuple[nn.Module, Tensor, int]] = []

    def __call__(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """What to keep of `tensor`."""
        if module in self._copied or tensor.is_inference():  # those count no versions
            return tensor.clone()
        self._versions.append((module, tensor, tensor._version))
        return tensor

    def written(self) -> set[nn.Module]:
        """Modules of which a tensor was kept that has been written to since, by PyTorch's own count: a run with copies of theirs is due."""
        return {module for module, tensor, version in self._versions if tensor._version != version}
