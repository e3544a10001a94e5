"""What a norm does, measured rather than read from class names. At a fixed scale it is a linear map: centring or not, then a gain.

norm(x) = gain ⊙ (x - mean?) / rms(x - mean?) + bias
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paramlens.method.generators import generator

_PROBES = 8


@dataclass(frozen=True)
class Norm:
    """A norm at a fixed scale."""

    gain: Float[Tensor, "d"]
    centred: bool

    def __call__(self, v: Float[Tensor, "part d"]) -> Float[Tensor, "part d"]:
        """Apply the norm to directions v, without scale and bias."""
        return (v - v.mean(1, keepdim=True) if self.centred else v) * self.gain


@torch.no_grad()
def norm_of(module: nn.Module, like: Float[Tensor, "*any d"]) -> Norm | None:
    """What `module` does to vectors as wide as `like`. None: it is not a norm.

    It is run on random vectors of different lengths and on their negatives, and must satisfy the equation above with one gain and one bias.
    """
    width, close = like.shape[-1], max(1e-3, 4 * torch.finfo(like.dtype).eps)
    sizes = torch.logspace(1, 2.5, _PROBES, dtype=torch.float64)[:, None]
    drawn = sizes * torch.randn(_PROBES, width, generator=generator("norm"), dtype=torch.float64)
    x = drawn.to(like)
    try:
        there, back = (module(each[None]) for each in (x, -x))
        there, back = there[0].double(), back[0].double()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # it does not take a single tensor of this shape
        return None
    if there.shape != x.shape:
        return None
    odd, even = (there - back) / 2, (there + back) / 2
    if (even - even.mean(0)).norm() > close * odd.norm():
        return None
    for centred in (False, True):
        given = x.double() - x.double().mean(1, keepdim=True) if centred else x.double()
        unit = given / given.square().mean(1, keepdim=True).sqrt()
        gain = (odd * unit).sum(0) / unit.square().sum(0)
        if _alike(odd, gain * unit, close):
            return Norm(gain.to(like), centred)
    return None


def factor(values: Tensor, of: Tensor, *, close: float = 1e-3) -> float | None:
    """The number c with values = c · of, up to `close`; vectors lie along the last axis. None: no such c, or `values` or `of` is all 0."""
    if values.shape[-1] != of.shape[-1] or values.numel() != of.numel():
        return None
    values, of = (each.double().reshape(-1, each.shape[-1]) for each in (values, of))
    c = ((values * of).sum() / of.square().sum().clamp(min=torch.finfo(torch.float64).tiny)).item()
    if c == 0 or not _alike(values, c * of, close):
        return None
    return 1.0 if abs(c - 1) < close else c


def _alike(values: Tensor, expected: Tensor, close: float) -> bool:
    return bool((values - expected).norm() <= close * expected.norm())
