"""Faithfulness, minimality, and one reconstruction loss with the table of its uses (eqs. 1 to 8).

A reconstruction loss is (which sites are replaced) × (which mask). Plans of all enabled losses run stacked in one forward pass.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paramlens.kernels import native
from paramlens.kernels.machine import fusible
from paramlens.method.batch import Batch, Inputs, last_positions
from paramlens.method.decomposition import Decomposition, Plan, TargetRun
from paramlens.method.importance import LEAK, upper
from paramlens.method.masks import Replacement, site_subsets, subset_shape
from paramlens.method.settings import Losses

CPU_STACK = 2**21
"""Logits computed in one pass on a CPU."""


@dataclass(frozen=True)
class Reconstruction:
    """Which sites a plan replaces (all in one plan, each alone in its own, one random subset) and by which mask (r or g)."""

    sites: Literal["all", "each", "subset"]
    mask: Literal["stochastic", "importance"]


RECONSTRUCTIONS: dict[str, Reconstruction] = {
    "stochastic_recon": Reconstruction("all", "stochastic"),  # eq. 2
    "stochastic_recon_layerwise": Reconstruction("each", "stochastic"),  # eq. 3
    "recon": Reconstruction("all", "importance"),  # L_recon, §4
    "recon_layerwise": Reconstruction("each", "importance"),  # Table 1c
    "recon_partial": Reconstruction("subset", "importance"),  # eqs. 5, 7
    "stochastic_recon_partial": Reconstruction("subset", "stochastic"),  # eqs. 6, 8
}


def faithfulness(decomposition: Decomposition) -> Float[Tensor, ""]:
    """Eq. 1: squared error of W - U V, summed over all entries of all sites, divided by the number of entries."""
    U, V = decomposition.U, decomposition.V
    squares = [(site.W - U[site.name] @ V[site.name]).square().sum() for site in decomposition.sites]
    return torch.stack(squares).sum() / sum(site.W.numel() for site in decomposition.sites)


def mean_square(decomposition: Decomposition) -> float:
    """Mean squared entry of the weights of all sites: what faithfulness is measured against."""
    squares = sum(site.W.double().square().sum().item() for site in decomposition.sites)
    return squares / sum(site.W.numel() for site in decomposition.sites)


def minimality(
    pre: Mapping[str, Float[Tensor, "*batch C"]], *, p: float | Tensor, eps: float, present: Float[Tensor, ""] | float = 1.0
) -> Float[Tensor, ""]:
    """Eq. 1: Σ_sites Σ_c ((g + ε)^p - ε^p), mean over batch and positions, for the upper importances g of pre-activations `pre`.

    present: the share of positions that count; at all others `pre` is 0, which costs nothing.

    Subtracting ε^p takes out the constant that ε adds (0.06 per subcomponent at p = 0.1, ε = 1e-12); the slope stays at most
    p ε^(p - 1).
    """
    return torch.stack([_Minimality.apply(value, p, eps) for value in pre.values()]).sum() / present


class _Minimality(torch.autograd.Function):
    """One site's minimality. The compiled loop finds the slope with the power, which costs most; PyTorch's twin computes it later."""

    @staticmethod
    def forward(ctx: Any, pre: Float[Tensor, "*batch C"], p: float | Tensor, eps: float) -> Float[Tensor, ""]:
        rows = pre.numel() // pre.shape[-1]
        ctx.p, ctx.eps, ctx.rows = p, eps, rows
        ctx.has_slope = native.serves(pre) and not isinstance(p, Tensor)
        if not ctx.has_slope:
            ctx.save_for_backward(pre)
            return _minimality(pre, p, eps) / rows
        pre = pre.contiguous()
        slope, sums = torch.empty_like(pre), pre.new_empty(native.units(pre))
        native.minimality(len(sums), pre, slope, sums, pre.numel(), p, eps)
        ctx.save_for_backward(slope)
        return sums.sum() / rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        scale = grad / ctx.rows
        return saved * scale if ctx.has_slope else _minimality_slope(saved, scale, ctx.p, ctx.eps), None, None


@fusible
def _minimality(pre: Tensor, p: float | Tensor, eps: float) -> Tensor:
    return ((upper(pre) + eps).pow(p) - eps**p).sum()


@fusible
def _minimality_slope(pre: Tensor, scale: Tensor, p: float | Tensor, eps: float) -> Tensor:
    slope = scale * p * (upper(pre) + eps).pow(p - 1) * torch.where(pre > 1, LEAK, 1.0)
    return torch.where(pre <= 0, 0, slope)


def annealed_p(losses: Losses, step: int, steps: int) -> float:
    """The power p of minimality at `step`: linear from p_start at step 0 to p_final at step `steps` - 1."""
    return losses.p_start + (losses.p_final - losses.p_start) * min(1.0, step / max(1, steps - 1))


@dataclass(frozen=True)
class LossAt:
    """The positions that the loss sees: all present ones, or the last present one of every sequence.

    present: (batch, pos), as in `Batch`. Logits of one position are taken to be those of the last.
    """

    last_token_only: bool = False
    present: Bool[Tensor, "batch pos"] | None = None

    def logits(self, logits: Float[Tensor, "*plan_and_batch token"]) -> Tensor:
        """The logits that the loss sees, in float32 at least; the axis of positions is kept."""
        logits = logits.float() if logits.element_size() < 4 else logits
        if not self.last_token_only:
            return logits
        if self.present is None or logits.shape[-2] == 1:
            return logits[..., -1:, :]
        last = last_positions(self.present)
        return logits[..., torch.arange(len(last), device=last.device), last, :].unsqueeze(-2)

    def log_probs(self, logits: Float[Tensor, "*batch token"]) -> Tensor:
        return self.logits(logits).log_softmax(-1)

    def divergence(self, target_log_probs: Float[Tensor, "*batch token"], logits: Float[Tensor, "plan *rest"]) -> Float[Tensor, "plan"]:
        """KL(target ‖ masked) in nats for each plan, mean over the loss positions; target_log_probs as `log_probs` gives them."""
        return kl_divergence(target_log_probs, self.logits(logits), self._where(target_log_probs))

    def count(self, logits: Float[Tensor, "*batch token"]) -> int:
        """Loss positions of a batch: its weight in a mean over several batches."""
        where = self._where(logits)
        return self.logits(logits)[..., 0].numel() if where is None else int(where.sum())

    def _where(self, log_probs: Float[Tensor, "*batch token"]) -> Tensor | None:
        """The positions of the loss that count; None for all, as where logits are of whole sequences or of their last position."""
        whole = self.last_token_only or log_probs.dim() == 2
        return None if whole else self.present


def kl_divergence(
    target_log_probs: Float[Tensor, "*batch token"], logits: Float[Tensor, "plan *batch token"], where: Bool[Tensor, "*batch"] | None = None
) -> Float[Tensor, "plan"]:
    """KL(target ‖ masked) in nats for each plan, mean over all positions, or over those of `where`."""
    divergence = _Divergence.apply(logits, target_log_probs).flatten(1)
    return divergence.mean(1) if where is None else (divergence * where.flatten()).sum(1) / where.sum()


class _Divergence(torch.autograd.Function):
    """KL(target ‖ masked) at every loss position; kept for the backward pass are the logits and one number a position."""

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "plan *batch token"], target: Tensor) -> Float[Tensor, "plan *batch"]:
        if native.serves(logits, target):
            logits, target = logits.contiguous(), target.contiguous()
            share = target.exp()
            divergence, norm = logits.new_empty(logits.shape[:-1]), logits.new_empty(logits.shape[:-1])
            sizes = (target.shape[-1], target.numel() // target.shape[-1])
            native.divergence_forward(norm.numel(), logits, target, share, divergence, norm, *sizes)
        else:
            share = target.exp()
            divergence, norm = _divergences(logits, target, share)
        ctx.save_for_backward(logits, share, norm)
        return divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "plan *batch"]) -> tuple[Float[Tensor, "plan *batch token"], None]:
        logits, share, norm = ctx.saved_tensors
        if native.serves(logits, share, norm, grad):
            below = torch.empty_like(logits)
            sizes = (share.shape[-1], share.numel() // share.shape[-1])
            native.divergence_backward(norm.numel(), logits, share, norm, grad.contiguous(), below, *sizes)
            return below, None
        return _divergence_slopes(logits, share, norm, grad), None


@fusible
def _divergences(logits: Tensor, target: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    norm = logits.logsumexp(-1)
    return (share * (target - (logits - norm[..., None]))).sum(-1), norm


@fusible
def _divergence_slopes(logits: Tensor, share: Tensor, norm: Tensor, grad: Tensor) -> Tensor:
    return grad[..., None] * ((logits - norm[..., None]).exp() - share)


def reconstruction_plans(
    name: str,
    g: Mapping[str, Float[Tensor, "*batch C"]],
    *,
    samples: int = 1,
    layerwise_sites: int | Literal["all"] = "all",
    partial_scope: Literal["forward", "sequence", "position"] = "forward",
    generator: Callable[[], torch.Generator],
) -> Iterator[Plan]:
    """The plans whose mean divergence is the loss `name`, or an unbiased estimate of it.

    Stochastic ones are drawn `samples` times, eq. 5 once; layerwise ones replace every site, or `layerwise_sites` drawn ones.
    """
    loss = RECONSTRUCTIONS[name]
    rng = generator()
    for _ in range(samples if loss.mask == "stochastic" else 1):
        if loss.mask == "stochastic":
            keys = torch.randint(2**31, (len(g),), generator=rng, device=rng.device).tolist()
            replacements = {site: Replacement(value, key) for (site, value), key in zip(g.items(), keys, strict=True)}
        else:
            replacements = {site: Replacement(value) for site, value in g.items()}
        if loss.sites == "all":
            yield replacements
        elif loss.sites == "each":
            order = list(replacements)
            if layerwise_sites != "all" and layerwise_sites < len(order):
                order = [order[i] for i in torch.randperm(len(order), generator=rng, device=rng.device)[:layerwise_sites].tolist()]
            yield from ({site: replacements[site]} for site in order)
        else:
            batch = tuple(next(iter(g.values())).shape[:-1])
            chosen = site_subsets(len(g), subset_shape(partial_scope, batch), rng)
            if partial_scope == "forward":
                yield {site: replacement for (site, replacement), inside in zip(replacements.items(), chosen, strict=True) if inside}
            else:
                chosen = chosen.to(next(iter(g.values())).device)
                yield {site: replace(value, where=inside) for (site, value), inside in zip(replacements.items(), chosen, strict=True)}


def reconstruction_losses(
    decomposition: Decomposition,
    inputs: Inputs,
    target: TargetRun,
    g: Mapping[str, Float[Tensor, "*batch C"]],
    coefficients: Mapping[str, float],
    *,
    at: LossAt,
    samples: int = 1,
    layerwise_sites: int | Literal["all"] = "all",
    partial_scope: Literal["forward", "sequence", "position"] = "forward",
    generator: Callable[[str], torch.Generator],
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Σ coefficient × loss over the losses named in `coefficients`, and each loss (nats, without gradient).

    Plans run in few stacked passes, each followed at once by its gradient, so that memory holds one pass at a time.
    inputs: what the masked runs are given; where the loss is `at` the last position they may ask the model for its last logits alone.
    generator: gives each loss its own random numbers by name.
    """
    if not coefficients:
        return next(iter(g.values())).new_zeros(()), {}
    leaves = {site: value.detach().requires_grad_() for site, value in g.items()}
    sinks = {site: torch.zeros_like(value) for site, value in leaves.items() if value.is_contiguous() and native.serves(value)}
    plans: list[tuple[str, Plan]] = []
    for name in coefficients:
        drawn = reconstruction_plans(
            name,
            leaves,
            samples=samples,
            layerwise_sites=layerwise_sites,
            partial_scope=partial_scope,
            generator=lambda name=name: generator(name),
        )
        plans += [(name, {site: replace(each, sink=sinks.get(site)) for site, each in plan.items()}) for plan in drawn]
    plans.sort(key=lambda each: (decomposition.entry(each[1]), -len(each[1])))  # whole plans together: they read every g
    count = Counter(name for name, _ in plans)
    target_log_probs = at.log_probs(target.logits)
    divergences: dict[str, list[Tensor]] = {name: [] for name in coefficients}

    def run(stack: Sequence[tuple[str, Plan]]) -> Tensor:
        logits = decomposition.masked_run(inputs, [plan for _, plan in stack], target)
        divergence = at.divergence(target_log_probs, logits)
        for (name, _), value in zip(stack, divergence.detach(), strict=True):
            divergences[name].append(value)
        return torch.stack([coefficients[name] / count[name] * value for (name, _), value in zip(stack, divergence, strict=True)]).sum()

    size = stack_size(target_log_probs.numel(), device=target_log_probs.device.type)
    stacks = [plans[i : i + size] for i in range(0, len(plans), size)]
    total = _Accumulated.apply(
        lambda: map(run, stacks), list(leaves.values()), [sinks.get(site) for site in g], *g.values(), *decomposition.parameters()
    )
    return total, {name: torch.stack(values).mean() for name, values in divergences.items()}


def local_loss(
    decomposition: Decomposition,
    target: TargetRun,
    g: Mapping[str, Float[Tensor, "*batch C"]],
    *,
    present: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """Σ ‖x W - ((x U) * g) V‖² / Σ ‖x W‖² over a site's positions where any g is above 0, mean over sites.

    No gradient reaches g: what is important is to carry all that the weight writes at that token, not to grow in number.
    """
    U, V, shares = decomposition.U, decomposition.V, list[Tensor]()
    for site in decomposition.sites:
        x, mask = target.inputs[site.name], g[site.name].detach()
        on = (mask > 0).any(-1) if present is None else (mask > 0).any(-1) & present
        written = site.product(x)
        missing = (written - (site.read(x, U[site.name]) * mask) @ V[site.name]) * on[..., None]
        shares.append(missing.square().sum() / (written * on[..., None]).square().sum().clamp(min=torch.finfo(written.dtype).tiny))
    return torch.stack(shares).mean()


def elsewhere_loss(
    decomposition: Decomposition, other: Batch, g: Mapping[str, Float[Tensor, "sequence pos C"]], *, generator: torch.Generator
) -> Float[Tensor, ""]:
    """KL in nats on other text, all sites replaced, with what is one sequence's own on in part and all the rest on.

    A subcomponent's share of being one sequence's own: its largest g there less its largest in any other; its mask is 1 less
    that share times u ~ U(0, 1). No gradient reaches g: what is important is settled by the sequences that are decomposed.
    """
    target = decomposition.target_run(other.inputs)
    plan: dict[str, Replacement] = {}
    keys = torch.randint(2**31, (len(g),), generator=generator, device=generator.device).tolist()
    for (site, value), key in zip(g.items(), keys, strict=True):
        most = value.detach().amax(1).sort(0, descending=True).values
        own = most[0] - most[1] if len(most) > 1 else most[0]
        plan[site] = Replacement((1 - own).expand(*target.inputs[site].shape[:-1], -1), key)
    at = LossAt(present=other.present)
    return at.divergence(at.log_probs(target.logits), decomposition.masked_run(other.inputs, [plan]))[0]


def stack_size(logits: int, *, device: str) -> int:
    """Plans in one pass, given the logits of one: on a CPU as many as keep the pass in cache, elsewhere all."""
    return max(1, CPU_STACK // logits) if device == "cpu" else 2**20


class _Accumulated(torch.autograd.Function):
    """The sum of `terms`, whose gradients are taken one after the other as the terms are made."""

    @staticmethod
    def forward(
        ctx: Any, terms: Callable[[], Iterable[Tensor]], leaves: list[Tensor], sinks: list[Tensor | None], *values: Tensor
    ) -> Tensor:
        """values: what the gradient goes to; `leaves` stand for the first of them in the terms, whose gradient may also be in `sinks`."""
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        inputs = [leaves[i] if i < len(leaves) else values[i] for i in wanted]
        sums = {i: sink for i, sink in enumerate(sinks) if sink is not None}
        total = values[0].new_zeros(())
        with torch.set_grad_enabled(bool(wanted)):
            for term in terms():
                total += term.detach()
                gradients = torch.autograd.grad(term, inputs, allow_unused=True) if wanted else ()
                for i, gradient in zip(wanted, gradients, strict=True):
                    if gradient is not None:
                        sums[i] = sums[i].add_(gradient) if i in sums else gradient
        ctx.gradients = [sums.get(i) for i in range(len(values))]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        torch._foreach_mul_([gradient for gradient in ctx.gradients if gradient is not None], grad)
        return None, None, None, *ctx.gradients
