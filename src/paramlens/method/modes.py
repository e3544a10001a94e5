"""State outside a run that could affect it: torch modes set by the caller, threads, and buffers that the model changes."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from paramlens.errors import ConfigError

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")

_threads: dict[int, int] = {}
"""Model's id → the thread that is running it with changed modules."""

_looking = threading.Lock()


@contextmanager
def default_modes() -> Iterator[None]:
    """While active, inference mode and autocast are off, and new tensors are float32 on the CPU by default.

    Gradients stay on or off as they were; in inference mode they are off.
    """
    gradients = torch.is_grad_enabled()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.set_grad_enabled(gradients))
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":
            modes.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        modes.callback(torch.set_default_dtype, dtype)
        yield


@contextmanager
def one_thread(model: nn.Module) -> Iterator[None]:
    """While active, no other thread runs `model` with changed modules or modes. Raises `ConfigError` if another already does."""
    here = threading.get_ident()
    with _looking:
        outermost = id(model) not in _threads
        if _threads.setdefault(id(model), here) != here:
            raise ConfigError("model: another thread is running it; wait for that, or give this one a copy (copy.deepcopy)")
    try:
        yield
    finally:
        if outermost:
            del _threads[id(model)]


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """At the end, every buffer of `model` is the same tensor with the same bits as before, even if it was written to or replaced."""
    attributes = {module: set(dir(module)) for module in model.modules()}
    before = [
        (module, name, buffer, buffer.detach().clone()) for module in attributes for name, buffer in module.named_buffers(recurse=False)
    ]
    known = {(module, name) for module, name, _, _ in before}
    try:
        yield
    finally:
        added = [(module, name) for module in attributes for name, _ in module.named_buffers(recurse=False) if (module, name) not in known]
        for module, name in added:
            if name in attributes[module]:
                setattr(module, name, None)
            else:
                delattr(module, name)
        for module, name, buffer, values in before:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            if not _same_bits(buffer, values):
                with torch.no_grad():
                    buffer.copy_(values)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, with NaN equal to NaN."""
    return a.is_meta or bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """While active, the model is in evaluation mode, its parameters require no gradient, and torch is in `default_modes`.

    At the end all of this is restored, even after an error, and the model's buffers too, bit for bit. Raises `ConfigError` if another
    thread is running the model.
    """
    with one_thread(model):
        training = [(module, module.training) for module in model.modules()]
        asking = [parameter for parameter in model.parameters() if parameter.requires_grad and not parameter.is_inference()]
        try:
            with default_modes(), buffers_kept(model):
                model.eval()
                for parameter in asking:
                    parameter.requires_grad_(False)
                yield
        finally:
            for module, mode in training:
                module.training = mode
            for parameter in asking:
                parameter.requires_grad_(True)
