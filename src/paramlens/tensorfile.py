"""Tensors in safetensors files, with errors that name the file and what was expected of it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from paramlens.errors import RunDirError


def load_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises `RunDirError` if it is missing or no safetensors file."""
    try:
        return load_file(file)
    except FileNotFoundError:
        raise RunDirError(f"{file}: missing") from None
    except SafetensorError as error:
        raise RunDirError(f"{file}: no safetensors file ({error})") from None


@torch.no_grad()
def copy_into(file: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into `targets`. Raises `RunDirError` naming the tensor that is missing, unexpected or of another shape."""
    loaded = load_tensors(file)
    for name in sorted(targets.keys() ^ loaded.keys()):
        raise RunDirError(f"{file}: tensor {name} is {'missing' if name in targets else 'unexpected'}; the file belongs to another model")
    for name, target in targets.items():
        if target.shape != loaded[name].shape:
            raise RunDirError(f"{file}: {name} has shape {tuple(loaded[name].shape)}, {tuple(target.shape)} was expected")
        target.copy_(loaded[name])
