"""How far two ways of computing the same number may lie apart: bounds from the arithmetic, the same for every processor.

A rounding changes a number by at most eps / 2 of itself, eps being 2^-23 in float32. If no term or intermediate sum is larger than
`size`, `roundings` of them in a row change the result by at most roundings · eps / 2 · size, whatever the order of a sum and whether
products are fused into it (Higham, Accuracy and Stability of Numerical Algorithms, sections 3.1 and 4.2; terms of second order left
out). Two ways lie at most twice as far apart; another factor of two is for library functions (exp, log, erf), which may be
off by a unit in the last place instead of half of one:

    |a - b| <= 2 · roundings · eps · size

A sum or product of n terms is n roundings in a row.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

TOY = 80
"""In a run of the tests' induction toy: two blocks of x U (4 terms), mask, times V (5), scores (4), softmax (8), mix (8), output (4), sum;
then logits (4) and log-softmax (7)."""

TOY_STEP = 4 * TOY
"""To a gradient of a step: the run, γ (as long), both ways back, then the sum over 3 or 4 sequences of 8 tokens and over plans."""

GPT = 400
"""In a run of the tests' two-block language models: norms, projections and MLPs of widths 16 to 64, softmax over a short sentence."""


def bound(roundings: int, size: float, dtype: torch.dtype = torch.float32) -> float:
    """2 · roundings · eps · size."""
    return 2 * roundings * torch.finfo(dtype).eps * size


def near(expected: float | Sequence[float], roundings: int, *, size: float | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Equal to `expected` within rounding; size: that of the largest term, unless it is the result's, as in sums of one sign."""
    if size is None:
        size = max(map(abs, expected)) if isinstance(expected, Sequence) else abs(expected)
    return pytest.approx(expected, rel=0, abs=bound(roundings, size, dtype))


def assert_near(actual: Tensor, expected: Tensor, roundings: int, *, size: float | None = None) -> None:
    """All numbers equal within rounding; size: that of the largest term, unless it is that of the largest result."""
    largest = expected.detach().abs().max().item() if size is None else size
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound(roundings, largest, expected.dtype))


def near_divergence(expected: float, logits: Tensor, roundings: int = TOY) -> Any:
    """A mean divergence from the distributions of `logits` (..., token), equal to `expected` within rounding.

    KL = Σ p (log p - log q) changes by Σ (q - p) e if the logits of q change by e, and Σ |q - p| <= √(2 KL) (Pinsker): what rounding does
    to the logits counts by that root. The terms are differences of log-probabilities, each of about the entropy's size under p: their last
    roundings count in full, four in a row (log Σ exp, both subtractions, the product).
    """
    log_p = logits.detach().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).max().item()
    spread = max(1.0, logits.detach().abs().max().item())
    return pytest.approx(expected, rel=0, abs=2 * math.sqrt(2 * abs(expected)) * bound(roundings, spread) + bound(4, max(1.0, entropy)))
