"""A check that the logits of a sequence do not depend on its padding."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paramlens.errors import BatchError
from paramlens.method.batch import Batch, last_positions
from paramlens.method.decomposition import call


@torch.no_grad()
def require_padding_unseen(model: nn.Module, batch: Batch, logits: Float[Tensor, "*batch token"]) -> None:
    """Run the shortest sequence of `batch` alone, without padding, and compare its logits with those in the batch.

    logits: of the target on the batch. Raises `BatchError` if they differ. A batch without padding is not checked.
    """
    if batch.present is None:
        return
    row = int(batch.present.sum(1).argmin())
    alone = call(model, batch.alone(row).inputs)[0]
    own = logits[row] if logits.dim() == 2 else logits[row][batch.present[row].to(logits.device)]
    if alone.shape == own.shape and torch.allclose(alone, own, rtol=1e-2, atol=1e-3 * max(1.0, own.abs().max().item())):
        return
    side = "right" if bool((last_positions(batch.present) < batch.present.shape[1] - 1).any()) else "left"
    remedy = {
        "left": "give position_ids that count from each sequence's first token, or pad on the right",
        "right": "the model must be causal or heed attention_mask; otherwise give batches of one length",
    }[side]
    raise BatchError(
        f"sequence {row} of the first batch, filled up on the {side}, has other logits than alone: the model looks at the padding; {remedy}"
    )
