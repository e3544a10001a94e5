"""KL(target ‖ masked) in nats, and the positions over which it is averaged."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paramlens.kernels import native
from paramlens.kernels.machine import fusible
from paramlens.method.batch import last_positions


@dataclass(frozen=True)
class LossAt:
    """The positions of the loss: all present ones, or the last present one of every sequence.

    present: (batch, pos), as in `Batch`. Logits of a single position are taken as those of the last.
    """

    last_token_only: bool = False
    present: Bool[Tensor, "batch pos"] | None = None

    def logits(self, logits: Float[Tensor, "*plan_and_batch token"]) -> Tensor:
        """The logits at the positions of the loss, in float32 or float64; the axis of positions is kept."""
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
        """KL(target ‖ masked) in nats for each plan, mean over the loss positions; `target_log_probs` comes from `log_probs`."""
        return kl_divergence(target_log_probs, self.logits(logits), self._where(target_log_probs))

    def count(self, logits: Float[Tensor, "*batch token"]) -> int:
        """Number of loss positions in a batch: its weight in a mean over several batches."""
        where = self._where(logits)
        return self.logits(logits)[..., 0].numel() if where is None else int(where.sum())

    def _where(self, log_probs: Float[Tensor, "*batch token"]) -> Tensor | None:
        """The loss positions that count. None: all, as when there is one per sequence."""
        whole = self.last_token_only or log_probs.dim() == 2
        return None if whole else self.present


def kl_divergence(
    target_log_probs: Float[Tensor, "*batch token"], logits: Float[Tensor, "plan *batch token"], where: Bool[Tensor, "*batch"] | None = None
) -> Float[Tensor, "plan"]:
    """KL(target ‖ masked) in nats for each plan, mean over the positions `where`. Defaults to all positions."""
    divergence = _Divergence.apply(logits, target_log_probs).flatten(1)
    return divergence.mean(1) if where is None else (divergence * where.flatten()).sum(1) / where.sum()


class _Divergence(torch.autograd.Function):
    """KL(target ‖ masked) at every loss position; keeps logits, target probabilities and one number per position for the gradient."""

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
