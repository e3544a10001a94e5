"""Hooks and replaced attributes of modules that exist only during a run; they are removed at its end, even after an error."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

_Hooks = Sequence[tuple[nn.Module, Callable[..., Any]]]


@contextmanager
def hooked(after: _Hooks = (), before: _Hooks = ()) -> Iterator[None]:
    """While active, each function is a hook of its module.

    after: forward hooks, called with (module, args, kwargs, output); a result that is not None replaces the output.
    before: forward pre-hooks, called with (module, args, kwargs); a result that is not None replaces (args, kwargs).
    """
    with ExitStack() as handles:
        for module, hook in after:
            handles.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        for module, hook in before:
            handles.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def given_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a module that takes one tensor, by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def swapped_in(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """While active, each module's `forward` is the given function; restored at the end, even after an error or Ctrl-C.

    Only `module.forward` is replaced, so the user's hooks still run.
    """
    with shadowed({(module, "forward"): forward for module, forward in forwards.items()}):
        yield


@contextmanager
def shadowed(values: Mapping[tuple[nn.Module, str], Any]) -> Iterator[None]:
    """While active, each named attribute of a module is the given value; parameters and buffers stay registered."""
    before = [(module, name, name in module.__dict__, module.__dict__.get(name)) for module, name in values]
    try:
        for (module, name), value in values.items():
            module.__dict__[name] = value
        yield
    finally:
        _restore(before)


def _restore(before: Sequence[tuple[nn.Module, str, bool, Any]]) -> None:
    try:
        for module, name, was_there, value in before:
            if was_there:
                module.__dict__[name] = value
            else:
                module.__dict__.pop(name, None)
    except KeyboardInterrupt:
        _restore(before)
        raise
