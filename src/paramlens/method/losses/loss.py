"""The definition of a loss: the name of its coefficient, and how it is computed from the inputs of a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from paramlens.method.batch import Batch
from paramlens.method.decomposition import Decomposition, TargetRun
from paramlens.method.generators import generator
from paramlens.method.losses.divergence import LossAt
from paramlens.method.settings import LOSS_NAMES, Losses, MethodSettings
from paramlens.method.sources import FreshSources
from paramlens.method.task import Task


@dataclass(frozen=True)
class LossInputs:
    """Everything that the losses of one step are computed from.

    target: the target's run on `batch`.
    pre, g: site → γ's pre-activations, and the importances [batch, pos, C] in [0, 1], both with gradient to γ.
    step: number of the step, from 0.
    p: minimality's power at this step; a tensor on the device if the step is captured as a CUDA graph.
    sources: those of `losses.adversarial`. Defaults to fresh ones.
    """

    config: MethodSettings
    task: Task
    decomposition: Decomposition
    batch: Batch
    target: TargetRun
    pre: Mapping[str, Float[Tensor, "*batch C"]]
    g: Mapping[str, Float[Tensor, "*batch C"]]
    step: int
    p: float | Tensor
    sources: FreshSources = field(default_factory=FreshSources)

    @property
    def at(self) -> LossAt:
        """The positions of the batch over which divergences are averaged."""
        return LossAt(self.config.last_token_only, self.batch.present)

    def generator(self, name: str) -> torch.Generator:
        """The random generator of the loss `name` at this step."""
        return generator(self.config.seed, "masks", name, self.step)


@dataclass(frozen=True)
class Loss:
    """A loss; name: of its coefficient in `settings.Losses`, its entry in metrics.jsonl, and its random generator."""

    name: str


@dataclass(frozen=True)
class DirectLoss(Loss):
    """A loss with its own function `value`, which returns a scalar with gradient to U, V and γ, or None at a step that is without it."""

    value: Callable[[LossInputs], Float[Tensor, ""] | None]


LOSSES: dict[str, Loss] = {}
"""Every loss by name."""

AnyLoss = TypeVar("AnyLoss", bound=Loss)


def register(loss: AnyLoss) -> AnyLoss:
    """Add a loss to `LOSSES`."""
    assert loss.name not in LOSSES, f"two losses are named {loss.name}"
    LOSSES[loss.name] = loss
    return loss


def enabled(settings: Losses) -> list[Loss]:
    """The losses with a coefficient above 0, in the order of the fields."""
    return [LOSSES[name] for name in LOSS_NAMES if getattr(settings, name)]
