"""Read and write tensors in safetensors files. Errors name the file and what was expected."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from paramlens.errors import RunDirError
from paramlens.files.plain import sync

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file and force it to the disk. Raises `OSError` if that fails."""
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)
    except SafetensorError as error:  # the library wraps the operating system's error
        raise OSError(None, str(error).removeprefix("Error while serializing: "), str(file)) from None
    sync(file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file. Raises `RunDirError` if it is missing or not a safetensors file."""
    try:
        return load_file(file)
    except FileNotFoundError:
        raise RunDirError(f"{file}: missing; restore the file from a copy") from None
    except (SafetensorError, OSError) as error:
        raise RunDirError(f"{file}: no safetensors file ({error}); restore the file from a copy") from None


def shapes_of(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape of every tensor of a file, and its type as the file names it. Reads only the header. Raises as `load_tensors` does."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                part = opened.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype()
    except FileNotFoundError:
        raise RunDirError(f"{file}: missing; restore the file from a copy") from None
    except (SafetensorError, OSError) as error:
        raise RunDirError(f"{file}: no safetensors file ({error}); restore the file from a copy") from None
    return found


def require_fit(file: Path, targets: Mapping[str, Tensor]) -> None:
    """Raise `RunDirError` if a tensor is missing, is unexpected, or has another shape or type. Reads only the file's header.

    `targets` may be on the meta device.
    """
    found = shapes_of(file)
    for name in sorted(targets.keys() ^ found.keys()):
        raise RunDirError(f"{file}: tensor {name} is {'missing' if name in targets else 'unexpected'}; the file belongs to another model")
    for name, target in targets.items():
        shape, dtype = found[name]
        if target.shape != shape:
            raise RunDirError(f"{file}: {name} has shape {shape}, {tuple(target.shape)} was expected; the file belongs to another model")
        if _DTYPES.get(dtype) != target.dtype:
            kind = str(target.dtype).removeprefix("torch.")
            raise RunDirError(f"{file}: {name} is of type {dtype}, {kind} was expected; the file belongs to another model")


@torch.no_grad()
def copy_into(file: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into `targets`. Raises `RunDirError` as `require_fit` does."""
    require_fit(file, targets)
    loaded = load_tensors(file)
    for name, target in targets.items():
        target.copy_(loaded[name])
