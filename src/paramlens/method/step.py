"""One step of Algorithm 3: losses, gradients, and a check that everything in the update is finite."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paramlens.errors import BatchError, DivergedError
from paramlens.method.batch import Batch, tensors_of
from paramlens.method.decomposition import Decomposition
from paramlens.method.entry import as_batch_error
from paramlens.method.generators import seed_of
from paramlens.method.importance.network import Importance
from paramlens.method.importance.sigmoids import lower
from paramlens.method.losses.loss import DirectLoss, LossInputs, enabled
from paramlens.method.losses.minimality import annealed_p
from paramlens.method.losses.reconstruction import Reconstruction, reconstruction_backward
from paramlens.method.masks import noise_from
from paramlens.method.settings import MethodSettings
from paramlens.method.sources import FreshSources, sources_of
from paramlens.method.start import project, project_gradients
from paramlens.method.task import Task


@dataclass(frozen=True)
class Step:
    """One training step before the update: losses by name, their weighted sum, and what they were computed from, without gradient."""

    losses: dict[str, Tensor]
    total: Tensor
    p: float | Tensor
    pre: Mapping[str, Tensor]
    g: dict[str, Tensor]
    target_logits: Tensor
    batch: Batch


def training_step(
    config: MethodSettings,
    task: Task,
    decomposition: Decomposition,
    importance: Importance,
    batch: Batch,
    step: int,
    *,
    p: float | Tensor | None = None,
    sources: FreshSources | None = None,
) -> Step:
    """Compute the losses on one minibatch and add their gradients to `.grad` of U, V and γ: lines 2 to 9 of Algorithm 3.

    Masked runs come first: each forward pass is followed by its own backward pass, which stops at g. Then one backward pass takes the
    gradients at g and those of all other losses through γ. Under `torch.no_grad` only the losses are computed.
    p: minimality's power. Defaults to its annealed value at `step`. sources: the adversary's, which persistent ones keep for the next
    step. Defaults to new ones.
    """
    with as_batch_error(f"step {step}: the model fails on the batch"):
        target = decomposition.target_run(batch.inputs)  # 2: run the original model
    pre = importance(target.seen, decomposition.U, batch.present)  # 3: causal importances on this batch
    g = {name: lower(value) for name, value in pre.items()}
    p = annealed_p(config.losses, step, config.steps) if p is None else p
    sources = sources_of(config.adversary) if sources is None else sources
    known = LossInputs(config, task, decomposition, batch, target, pre, g, step, p, sources)
    losses = enabled(config.losses)
    # 4, 5, 8: masks, masked runs, divergences
    values, to_g = reconstruction_backward(known, [loss for loss in losses if isinstance(loss, Reconstruction)])
    direct = {loss.name: loss.value(known) for loss in losses if isinstance(loss, DirectLoss)}  # and all other losses
    values |= {name: value for name, value in direct.items() if value is not None}
    total = torch.stack([getattr(config.losses, name) * value for name, value in values.items()]).sum()  # 9
    roots: list[tuple[Tensor, Tensor | None]] = [(total, None)] if total.requires_grad else []
    roots += [(g[site], gradient) for site, gradient in to_g.items() if g[site].requires_grad]
    if roots:
        torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
    sources.after_backward(config.adversary.step_size)
    values, pre, g = ({name: value.detach() for name, value in each.items()} for each in (values, pre, g))
    return Step(values, total.detach(), p, pre, g, target.logits, batch)


class Steps:
    """Whole steps (losses, gradients, check and update), run as usual or replayed as one CUDA graph.

    On a GPU the host does not wait for the device: the check sets a flag there, which stops all further updates once a step is not
    finite. `require_finite` reads the flag.
    """

    def __init__(
        self,
        config: MethodSettings,
        task: Task,
        decomposition: Decomposition,
        importance: Importance,
        optimizer: torch.optim.Optimizer,
        *,
        sources: FreshSources | None = None,
    ) -> None:
        self.sources = sources_of(config.adversary) if sources is None else sources
        self.config, self.task, self.decomposition, self.importance, self.optimizer = config, task, decomposition, importance, optimizer
        self.parameters = [*decomposition.parameters(), *importance.parameters()]
        self.clipped = [list(decomposition.U.values()), list(decomposition.V.values()), list(importance.parameters())]
        self.broken = torch.zeros((), device=decomposition.device)
        self.waits = decomposition.device.type != "cuda"
        if not self.waits:
            optimizer.found_inf = self.broken  # pyright: ignore[reportAttributeAccessIssue]  # read by fused Adam
        self.replay = _Replay(self) if config.cuda_graph else None

    def __call__(self, batch: Batch, step: int) -> Step:
        """Do one step, lines 2 to 10. Raises `DivergedError` instead of an update that is not finite; on a GPU `require_finite` does."""
        return self.run(batch, step) if self.replay is None else self.replay(batch, step)

    def run(self, batch: Batch, step: int, p: Tensor | None = None) -> Step:
        self.optimizer.zero_grad()
        result = training_step(self.config, self.task, self.decomposition, self.importance, batch, step, p=p, sources=self.sources)
        start = self.config.optim.project_from
        projecting = start is not None and step >= start * self.config.steps
        if projecting:
            project_gradients(self.decomposition)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        self.broken.copy_(torch.maximum(self.broken, (~_finite(result, norm)).to(self.broken.dtype)))
        if self.waits:
            self.require_finite(result, step)
        if self.config.optim.clip is not None:
            for parameters in self.clipped:
                nn.utils.clip_grad_norm_(parameters, self.config.optim.clip)
        self.optimizer.step()
        if projecting:
            project(self.decomposition)
        return result

    def require_finite(self, result: Step, step: int) -> None:
        """Raise `DivergedError`, with the loss and the site, if anything in an update was not finite."""
        if not self.broken.item():
            return
        decomposition, importance = self.decomposition, self.importance

        def broken(tensors: Mapping[str, Tensor | None]) -> str:
            names = [name for name, value in tensors.items() if value is not None and not torch.isfinite(value).all()]
            return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

        gradients = {f"U at {name}": U.grad for name, U in decomposition.U.items()}
        gradients |= {f"V at {name}": V.grad for name, V in decomposition.V.items()}
        for group in importance.typed_groups:
            for i, site in enumerate(group.names):
                gradients |= {f"γ's {key} at {site}": value.grad[i] for key, value in group.named_parameters() if value.grad is not None}
        if (trunk := importance.trunk) is not None:
            gradients |= {f"γ's {key} in the trunk": value.grad for key, value in trunk.named_parameters()}
        losses = broken(result.losses)
        floats = {str(i): value for i, value in enumerate(_floats(result.batch)) if value.isnan().any()}
        causes = [
            ("the batch's tensor", ", ".join(floats)),
            ("the target's", broken({"logits": result.target_logits})),
            ("U at", broken(decomposition.U)),
            ("V at", broken(decomposition.V)),
            ("γ's pre-activation at", broken(result.pre)),
            ("the gradient of", broken(gradients)),
        ]
        where = next((f"{what} {names}" for what, names in causes if names), "every site finite")  # the first match is the origin
        when = "" if self.waits else "by "
        kinds = {f"loss {losses}": losses, "an importance": broken(result.pre), "the batch": floats}
        what = next((kind for kind, holds in kinds.items() if holds), "a gradient")
        remedy = "Mend that batch" if floats else "Lower optim.lr and start anew"
        raise DivergedError(
            f"{when}step {step}: {what} is not finite ({where}); nothing was updated. {remedy}; the last checkpoint is from before"
        )


def _finite(result: Step, norm: Tensor) -> Tensor:
    """Whether everything in an update is finite: the loss, the gradient's norm, every importance, the batch.

    The loss can be finite although an importance or the batch is not: importances are clamped, and attention can ignore inputs.
    """
    sums = [value.sum() for value in result.pre.values()]
    broken = [value.isnan().any() for value in _floats(result.batch)]  # -inf is allowed: masks contain it
    finite = torch.stack([result.total, norm, *sums]).isfinite().all()
    return finite & ~torch.stack(broken).any() if broken else finite


def _floats(batch: Batch) -> list[Tensor]:
    return [tensor for tensor in tensors_of(batch.inputs) if tensor.is_floating_point()]


class _Replay:
    """The step as a CUDA graph: captured once, after a few ordinary steps, then replayed on inputs that are copied into its tensors."""

    WARM = 3
    """Ordinary steps before the capture, in which libraries allocate what they need."""

    def __init__(self, steps: Steps) -> None:
        device = steps.decomposition.device
        self.steps, self.graph, self.done = steps, CudaGraph(), 0
        self.p = torch.zeros((), device=device, dtype=steps.parameters[0].dtype)
        self.rng = torch.Generator(device=device)
        self.batch: Batch | None = None
        self.result: Step | None = None

    def __call__(self, batch: Batch, step: int) -> Step:
        config = self.steps.config
        self._place(batch)
        self.p.fill_(annealed_p(config.losses, step, config.steps))
        self.rng.manual_seed(seed_of(config.seed, "masks", step))
        if self.done < self.WARM:
            self.result = self.graph.warm(self._run)
        elif self.done == self.WARM:
            self.steps.optimizer.zero_grad()
            self.result = self.graph.capture(self._run, self.rng)
        if self.done >= self.WARM:
            self.graph.replay()
        self.done += 1
        assert self.result is not None
        return self.result

    def _run(self) -> Step:
        assert self.batch is not None
        with noise_from(self.rng):
            return self.steps.run(self.batch, 0, self.p)

    def _place(self, batch: Batch) -> None:
        if self.batch is None:
            self.batch = batch.map(torch.clone)
            return
        kept, given = (tensors_of((each.inputs, each.present)) for each in (self.batch, batch))
        if [tensor.shape for tensor in kept] != [tensor.shape for tensor in given]:
            raise BatchError("cuda_graph true replays one shape of batch, and this one has another; give cuda_graph false")
        for place, tensor in zip(kept, given, strict=True):
            place.copy_(tensor, non_blocking=True)


class CudaGraph:
    """A captured function without arguments, and the stream that capturing needs."""

    def __init__(self) -> None:
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def warm(self, function: Callable[[], Step]) -> Step:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], Step], rng: torch.Generator) -> Step:
        self.graph.register_generator_state(rng)
        with torch.cuda.graph(self.graph):
            return function()

    def replay(self) -> None:
        self.graph.replay()
