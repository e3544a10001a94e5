"""Checks that a model can be decomposed: made once, on the first batch, before a run starts; each failure is an error of one line.

A run can be trusted only if all of this is true: the model gives the same logits twice; every site computes x @ W + bias of its input,
so that masks of ones give the target; the logits depend on every site, with a gradient that needs no second forward pass; plans stacked
along the batch do not affect each other; and no run changes a weight.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from paramlens.errors import BatchError, ConfigError, DivergedError, ParamLensError, SiteError
from paramlens.method.batch import Inputs, tensors_of
from paramlens.method.decomposition import Decomposition, Plan, TargetRun, call
from paramlens.method.hooks import hooked
from paramlens.method.masks import Replacement
from paramlens.method.sites import Product, Site, TargetRows, by_place, replaced, watched
from paramlens.method.slices import require_slices

FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError, NotImplementedError)
"""Exceptions that a model may raise on inputs that it cannot process."""

_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
_TOLERANCE = 1e-2
"""Tolerance between runs that agree in exact arithmetic, as a share of the largest logit; large enough for TF32."""


def require_plain(model: nn.Module) -> None:
    """Raise `ConfigError` if the model is wrapped, compiled, lazy, on the meta device or on several: its weights cannot be replaced."""
    name = type(model).__name__
    if name in _WRAPPERS:
        raise ConfigError(f"model: wrapped in {name}, which splits batches over processes of its own; give model.module")
    for path, module in model.named_modules():
        at = f"model.{path}" if path else "model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(f"{at}: made by torch.jit, so that its modules cannot be replaced; give the nn.Module it was made from")
        if "_orig_mod" in dict(module.named_children()) or module.__dict__.get("_compiled_call_impl") is not None:
            raise ConfigError(f"{at}: compiled by torch.compile, so that its modules cannot be replaced; give the model before compiling")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for path, tensor in tensors:
        if is_lazy(tensor):
            raise ConfigError(f"model.{path}: has no shape yet (a lazy module); run the model once on a batch")
        if tensor.is_meta:
            raise ConfigError(f"model.{path}: is on the meta device, without values; load the weights (device_map offloads some of them)")
    for path, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ConfigError(
                f"model.{path}: was made under torch.inference_mode(), where tensors have no gradients; make or load the model outside it"
            )
    if len(devices := {str(tensor.device) for _, tensor in tensors}) > 1:
        raise ConfigError(f"model: lies on several devices ({', '.join(sorted(devices))}); move it to one, model.to(...)")


def require_sound(decomposition: Decomposition, inputs: Inputs) -> TargetRun:
    """Check that runs of the model can be trusted, and return the target's run on the first batch.

    Raises `BatchError` for a problem of the batch or of the model's output, `DivergedError` for logits that are not finite, and
    `SiteError` for a problem of a site.
    """
    if any(tensor.is_inference() for tensor in tensors_of(inputs)):
        raise BatchError("batch: made under torch.inference_mode(), where tensors have no gradients; make batches outside it")
    for site in decomposition.sites:
        if not torch.isfinite(site.W).all():
            raise SiteError(f"site {site.name}: its weight holds values that are not finite. Leave it out: add '!{site.name}' to sites")
    before = _fingerprints(decomposition.model)
    with as_batch_error("the model fails on the first batch"):
        target = decomposition.target_run(inputs)
        again = decomposition.target_run(inputs).logits
    _require_logits(decomposition, inputs, target)
    if again.shape != target.logits.shape or not _close(again, target.logits):
        raise BatchError(
            "the model's logits for the same batch differ from run to run; turn off the cause: dropout that ignores "
            "model.eval(), random numbers, or a counter or cache that it keeps between runs"
        )
    del again
    changed = [name for name, value in _fingerprints(decomposition.model).items() if before.get(name) != value]
    if changed:
        raise SiteError(f"the model changes its own weight {changed[0]} while it runs, so there is no one weight to decompose")
    _require_leading(inputs, target)
    _require_exact(decomposition, inputs, target)
    with as_batch_error("slices of a fused projection cannot be measured on the first batch"):
        require_slices(decomposition, inputs)
    _require_stackable(decomposition, inputs, target)
    return target


def _require_logits(decomposition: Decomposition, inputs: Inputs, target: TargetRun) -> None:
    logits = target.logits
    shape = tuple(logits.shape)
    if not logits.is_floating_point():
        raise BatchError(f"the model returned {str(logits.dtype).removeprefix('torch.')} {shape}; logits must be floating point")
    if logits.dim() < 2 or _is_squeezed(decomposition.model, inputs, logits):
        raise BatchError(f"the model's output {shape} has no axis of classes or tokens; logits end in one, of two entries or more")
    if shape[-1] < 2:
        raise BatchError(
            f"the model's output {shape} is one number, and softmax over one number is always 1: every reconstruction loss would be "
            "exactly 0, whatever the masks. Give a model of two logits or more, such as (0, x) for one logit x"
        )
    if not torch.isfinite(logits).all():
        raise DivergedError("the target's logits on the first batch are not finite; check the model and the batch")
    if (logits >= 0).all() and torch.allclose(logits.sum(-1), torch.ones((), dtype=logits.dtype, device=logits.device), atol=1e-3):
        raise BatchError(
            "the model returns probabilities: its outputs sum to 1. Softmax would be applied a second time; return the logits before it"
        )
    for site in decomposition.sites:
        given = target.seen[site.name].dtype
        if given != site.W.dtype:
            raise SiteError(
                f"site {site.name}: the model gives it {str(given).removeprefix('torch.')}, its weight is "
                f"{str(site.W.dtype).removeprefix('torch.')}; remove torch.autocast or the cast from the model's forward"
            )


def _is_squeezed(model: nn.Module, inputs: Inputs, logits: Tensor) -> bool:
    """Whether the logits are the output of a layer with one unit, with the last axis removed."""
    found: list[bool] = []

    def look(_module: nn.Module, _args: object, _kwargs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.shape == (*logits.shape, 1):
            found.append(bool(torch.equal(output[..., 0], logits)))

    ends = [(module, look) for module in model.modules() if getattr(module, "out_features", None) == 1]
    if not ends:
        return False
    with torch.no_grad(), hooked(ends):
        call(model, inputs)
    return any(found)


def _require_leading(inputs: Inputs, target: TargetRun) -> None:
    """Raise unless the first axis of every site's input is the batch, and all sites have the same leading axes."""
    given = next(tensor for tensor in tensors_of(inputs) if tensor.dim())
    rows = given.shape[0]
    in_a_row = {math.prod(given.shape[:2]), math.prod(target.logits.shape[:-1])}
    shapes = {name: tuple(value.shape[:-1]) for name, value in target.inputs.items()}
    for name, shape in shapes.items():
        if not (shape[:1] == (rows,) or (len(shape) == 1 and shape[0] in in_a_row)):
            what = f"site {name}: is given {tuple(target.inputs[name].shape)}, while the batch has {rows} rows"
            if shape[1:2] == (rows,):
                raise SiteError(f"{what}: its axes are (pos, batch, d); build the model with batch_first=True")
            raise SiteError(
                f"{what}: it sees some of the positions (an expert?) or does not lead with the batch axis. "
                f"Leave it out: add '!{name}' to sites"
            )
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise SiteError(f"sites {first} and {name}: inputs lead with {shapes[first]} and {shape}; decompose them in runs of their own")


def _require_exact(decomposition: Decomposition, inputs: Inputs, target: TargetRun) -> None:
    """Raise unless exact factors (U the identity, V the weight) with masks of ones give the target's logits, with gradients.

    The weights require gradients during this check. A weight that gets one is also used outside its site.
    """
    sites, probes = decomposition.sites, dict[Site, list[Tensor]]()
    products = {site: Product(partial(_exact, site, probes.setdefault(site, []))) for site in sites}
    weights = {weight: own[0] for place, own in by_place(sites).items() for weight in place.replaced_weights(own)}
    again: list[Site] = []
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), as_batch_error("the model fails with its sites replaced by their own weights"):
            with replaced(products):
                logits = call(decomposition.model, inputs)
            for site, found in probes.items():
                if len(found) != 1:
                    raise SiteError(f"site {site.name}: called {len(found)} times when replaced; a site must be called exactly once")
            try:
                with watched(sites, lambda site, _x: again.append(site)):
                    gradients = _gradients(logits, [*(probe for [probe] in probes.values()), *weights])
            finally:
                if again:
                    raise SiteError(
                        f"site {again[0].name}: the model computes it again during the backward pass (activation checkpointing), when it "
                        "is no longer replaced; turn checkpointing off"
                    )
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    if not _close(logits.detach(), target.logits):
        raise SiteError("the model gives other logits where its sites compute x @ W + bias: a site's output also depends on something else")
    for site, gradient in zip(weights.values(), gradients[len(probes) :], strict=True):
        if gradient is not None:
            raise SiteError(
                f"site {site.name}: the model uses its weight outside the module as well, where it would not be replaced. "
                f"Leave it out: add '!{site.name}' to sites"
            )
    for site, gradient in zip(probes, gradients[: len(probes)], strict=True):
        if gradient is None or not gradient.any():
            raise SiteError(
                f"site {site.name}: the logits of the first batch do not depend on its output, so nothing could be learned about it "
                f"(its output is detached, unused, or multiplied by zero). Leave it out: add '!{site.name}' to sites"
            )


def _exact(site: Site, probes: list[Tensor], x: Tensor, target: TargetRows) -> Tensor:
    """A site's x @ W + bias, after a check that the model computes the same.

    A tensor of zeros is added to it, to measure the output's gradient.
    """
    if not torch.is_grad_enabled():
        raise SiteError(
            f"site {site.name}: the model calls it with gradients off (torch.no_grad, or a checkpoint with use_reentrant=True), so nothing "
            "could be learned about it; remove that from the model's forward"
        )
    if torch.is_autocast_enabled(x.device.type):
        raise SiteError(f"site {site.name}: the model calls it under torch.autocast; remove that from its forward, or leave the site out")
    with torch.no_grad():
        theirs = target(0, len(x))
    y = site.product(x) if site.bias is None else site.product(x) + site.bias.detach()
    if y.shape != theirs.shape or y.dtype != theirs.dtype or not _close(y.detach(), theirs, within=1e-3):
        maker = type(site.place.module).__name__
        raise SiteError(f"site {site.name}: {maker} computes something other than x @ W + bias")
    probes.append(torch.zeros_like(y, requires_grad=True))
    return y + probes[-1]


def _gradients(logits: Tensor, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of a weighted sum of all logits, with different weights; None for a tensor on which the logits do not depend."""
    if not logits.requires_grad:
        return (None,) * len(wanted)
    weights = torch.arange(logits.numel(), device=logits.device, dtype=torch.float64).add_(1).cos_().to(logits.dtype).view(logits.shape)
    return torch.autograd.grad((logits * weights).sum(), wanted, allow_unused=True)


def _require_stackable(decomposition: Decomposition, inputs: Inputs, target: TargetRun) -> None:
    """Raise unless stacked plans give the same logits as each plan alone."""
    off = {name: Replacement(U.new_zeros(*target.inputs[name].shape[:-1], U.shape[1])) for name, U in decomposition.U.items()}
    plans: list[Plan] = [off, {}]
    advice = "every tensor of a batch must lead with the batch axis, and so must what each site is given"
    with torch.no_grad():
        try:
            stacked = decomposition(inputs, plans)
        except (*FAILURES, BatchError) as error:
            raise BatchError(f"the model fails on plans stacked along the batch ({_line(error)}); {advice}") from None
        for plan, logits in zip(plans, stacked, strict=True):
            alone = decomposition(inputs, [plan])[0]
            if logits.shape != alone.shape or not _close(logits, alone):
                raise BatchError(f"plans stacked along the batch differ from single ones; {advice}")


def _close(a: Tensor, b: Tensor, *, within: float = _TOLERANCE) -> bool:
    return bool((a - b).abs().max() <= within * b.abs().max())


def _fingerprints(model: nn.Module) -> dict[str, str]:
    """Parameter's name → its sum, as text, which almost always changes if any of its bits does; nan equals nan."""
    return {name: float(parameter.detach().sum(dtype=torch.float64)).hex() for name, parameter in model.named_parameters()}


@contextmanager
def as_batch_error(what: str) -> Iterator[None]:
    """While active, errors of the model become a `BatchError` of one line; errors of this library and of lack of memory are unchanged."""
    try:
        yield
    except (ParamLensError, torch.OutOfMemoryError):
        raise
    except FAILURES as error:
        raise BatchError(f"{what} ({_line(error)})") from error


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    hint = "; are all tokens below the size of the vocabulary?" if isinstance(error, IndexError) else ""
    return f"{type(error).__name__}: {lines[0]}{hint}" if lines else type(error).__name__
