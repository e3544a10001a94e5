"""Bodies of the compiled loops of `native`; imported only if Numba is installed.

A body takes `d`, the addresses and integers that its caller packed (floats as their bits), and computes units `first` to `last`;
its first lines unpack `d`. Loops over rows or numbers are innermost and contiguous, so that the compiler vectorises them.
Sums may be reassociated, but NaN and infinity keep their meaning, so that a step that is not finite is detected.
"""

import ctypes
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import carray, cfunc, njit, types

from paramlens.kernels.elementary import (
    HALF,
    LEAK,
    ONE,
    OPTIONS,
    ZERO,
    exp,
    f32,
    floats,
    half_erf,
    highest,
    i32,
    log,
    normal_density,
    normal_share,
    stream,
    uniform_of,
)

SLOTS = 24
"""Number of 64-bit words in the packed argument."""
BLOCK = 4096
"""How many numbers one unit of an elementwise kernel has."""


def enabled() -> bool:
    return not numba.config.DISABLE_JIT  # pyright: ignore[reportAttributeAccessIssue]


def prefer_wide_vectors() -> None:
    """Let LLVM use 512-bit vectors if the processor has them; by default it uses 256 bits, and γ's loops take a fifth longer.

    This applies to everything that this process compiles with Numba afterwards. NUMBA_CPU_NAME and NUMBA_CPU_FEATURES have priority.
    """
    config: Any = numba.config
    if config.CPU_NAME or config.CPU_FEATURES:
        return
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this processor's features
        return
    if features.get("avx512f"):
        config.CPU_NAME, config.CPU_FEATURES = llvm.get_host_cpu_name(), features.flatten() + ",-prefer-256-bit"


@njit(inline="always")
def _first() -> int:
    return 0


@njit(inline="always")
def _one() -> int:
    return 1


def compiled(name: str, openmp: ctypes.CDLL | None) -> Any:
    """The body `name` as a C function of one packed argument, which computes its thread's share of the units."""
    body = njit(**OPTIONS)(globals()[name])
    thread, threads = (_first, _one) if openmp is None else (openmp.omp_get_thread_num, openmp.omp_get_num_threads)

    @cfunc(types.void(types.CPointer(types.int64)))
    def run(packed: Any) -> None:
        d = carray(packed, SLOTS, np.int64)
        i, n = thread(), threads()
        body(d, d[0] * i // n, d[0] * (i + 1) // n)

    return run


def mlps_forward(d: Any, first: int, last: int) -> None:
    """Σ_h gelu(z + b) w + b_out for each subcomponent (unit) and row; z (C h, rows) is x w_in, `out` (rows, C)."""
    rows, C, h = d[6], d[7], d[8]
    z, b, w = floats(d[1], (C * h, rows)), floats(d[2], (C * h,)), floats(d[3], (C, h))
    b_out, out = floats(d[4], (C,)), floats(d[5], (rows, C))
    total = np.empty(rows, np.float32)
    for c in range(first, last):
        total[:] = b_out[c]
        for j in range(h):
            before, bias, weight = z[c * h + j], b[c * h + j], w[c, j]
            for r in range(rows):
                v = before[r] + bias
                total[r] += weight * v * (HALF + half_erf(v))
        for r in range(rows):
            out[r, c] = total[r]


def mlps_backward(d: Any, first: int, last: int) -> None:
    """Gradients of `mlps_forward` from that of its result, `above` (rows, C): written into z, added to those of b, w and b_out."""
    rows, C, h = d[8], d[9], d[10]
    z, b, w = floats(d[1], (C * h, rows)), floats(d[2], (C * h,)), floats(d[3], (C, h))
    above = floats(d[4], (rows, C))
    grad_b, grad_w, grad_b_out = floats(d[5], (C * h,)), floats(d[6], (C, h)), floats(d[7], (C,))
    a = np.empty(rows, np.float32)
    for c in range(first, last):
        total = ZERO
        for r in range(rows):
            a[r] = above[r, c]
            total += a[r]
        grad_b_out[c] += total
        for j in range(h):
            before, bias, weight = z[c * h + j], b[c * h + j], w[c, j]
            to_bias, to_weight = ZERO, ZERO
            for r in range(rows):
                v = before[r] + bias
                density = normal_density(v)
                share = normal_share(v, density)
                to_weight += a[r] * v * share
                below = a[r] * weight * (share + v * density)
                to_bias += below
                before[r] = below
            grad_b[c * h + j] += to_bias
            grad_w[c, j] += to_weight


def scalar_mlps_forward(d: Any, first: int, last: int) -> None:
    """Σ_h gelu(x w_in + b) w + b_out for each subcomponent (unit) and row; x is the subcomponent's own number, x and `out` (rows, C)."""
    rows, C, h = d[7], d[8], d[9]
    x, out = floats(d[1], (rows, C)), floats(d[6], (rows, C))
    w_in, b, w, b_out = floats(d[2], (C, h)), floats(d[3], (C, h)), floats(d[4], (C, h)), floats(d[5], (C,))
    read, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for c in range(first, last):
        for r in range(rows):
            read[r] = x[r, c]
        total[:] = b_out[c]
        for j in range(h):
            scale, bias, weight = w_in[c, j], b[c, j], w[c, j]
            for r in range(rows):
                v = read[r] * scale + bias
                total[r] += weight * v * (HALF + half_erf(v))
        for r in range(rows):
            out[r, c] = total[r]


def scalar_mlps_backward(d: Any, first: int, last: int) -> None:
    """Gradients of `scalar_mlps_forward` from that of its result, `above`: written into `to_x`, added to those of the parameters."""
    rows, C, h = d[11], d[12], d[13]
    x, above, to_x = floats(d[1], (rows, C)), floats(d[5], (rows, C)), floats(d[6], (rows, C))
    w_in, b, w = floats(d[2], (C, h)), floats(d[3], (C, h)), floats(d[4], (C, h))
    grad_w_in, grad_b, grad_w, grad_b_out = floats(d[7], (C, h)), floats(d[8], (C, h)), floats(d[9], (C, h)), floats(d[10], (C,))
    read, a, total = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
    for c in range(first, last):
        to_output = ZERO
        for r in range(rows):
            read[r], a[r], total[r] = x[r, c], above[r, c], ZERO
            to_output += a[r]
        grad_b_out[c] += to_output
        for j in range(h):
            scale, bias, weight = w_in[c, j], b[c, j], w[c, j]
            to_scale, to_bias, to_weight = ZERO, ZERO, ZERO
            for r in range(rows):
                v = read[r] * scale + bias
                density = normal_density(v)
                share = normal_share(v, density)
                to_weight += a[r] * v * share
                below = a[r] * weight * (share + v * density)
                to_bias += below
                to_scale += below * read[r]
                total[r] += below * scale
            grad_w_in[c, j] += to_scale
            grad_b[c, j] += to_bias
            grad_w[c, j] += to_weight
        for r in range(rows):
            to_x[r, c] = total[r]


def lower_backward(d: Any, first: int, last: int) -> None:
    """`out` = `grad` times the slope of `lower` at `pre`; a unit is BLOCK numbers."""
    start = first * BLOCK
    n = min(last * BLOCK, d[4]) - start
    pre, grad, out = floats(d[1] + 4 * start, (n,)), floats(d[2] + 4 * start, (n,)), floats(d[3] + 4 * start, (n,))
    for i in range(n):
        v, above = pre[i], grad[i]
        leaking = LEAK * min(above, ZERO)
        inside = above if v <= ONE else ZERO
        out[i] = inside if v > ZERO else leaking


def minimality(d: Any, first: int, last: int) -> None:
    """`out`[unit] = Σ ((upper(pre) + ε)^p - ε^p) over its BLOCK numbers, 0 where pre <= 0; `slope` = the derivative by pre."""
    reals = d.view(np.float64)
    out, p, eps = floats(d[3], (d[0],)), f32(reals[5]), f32(reals[6])
    offset = f32(reals[6] ** reals[5])
    for unit in range(first, last):
        n = min(BLOCK, d[4] - unit * BLOCK)
        pre, slope = floats(d[1] + 4 * BLOCK * unit, (n,)), floats(d[2] + 4 * BLOCK * unit, (n,))
        total = ZERO
        for i in range(n):
            v = pre[i]
            x = max(v if v <= ONE else ONE + LEAK * (v - ONE), ZERO) + eps
            power = exp(p * log(x))
            cost = power - offset if v < f32(1e30) else v
            total += ZERO if v <= ZERO else cost
            inside = p * power / x
            kinked = inside if v <= ONE else LEAK * inside
            slope[i] = ZERO if v <= ZERO else kinked
        out[unit] = total


def uniform(d: Any, first: int, last: int) -> None:
    """`out`[i] = the noise of a key at index i; a unit is BLOCK numbers."""
    start, (origin, stride) = first * BLOCK, stream(d[3])
    n = i32(min(last * BLOCK, d[2]) - start)
    out, place = floats(d[1] + 4 * start, (n,)), np.uint32(start)
    for i in range(i32(0), n):
        out[i] = uniform_of(np.uint32(origin + np.uint32(np.uint32(place + np.uint32(i)) * stride)))


def mask_forward(d: Any, first: int, last: int) -> None:
    """`inner` *= g, or with a key g + (1 - g) u, where u is the key's noise at its index; in place."""
    start, noisy, (origin, stride) = first * BLOCK, d[4], stream(d[5])
    n = i32(min(last * BLOCK, d[3]) - start)
    inner, g, place = floats(d[1] + 4 * start, (n,)), floats(d[2] + 4 * start, (n,)), np.uint32(d[6] + start)
    if noisy:
        for i in range(i32(0), n):
            u = uniform_of(np.uint32(origin + np.uint32(np.uint32(place + np.uint32(i)) * stride)))
            inner[i] *= g[i] + (ONE - g[i]) * u
    else:
        for i in range(n):
            inner[i] *= g[i]


def mask_backward(d: Any, first: int, last: int) -> None:
    """`inner` becomes the masked activation, `grad` turns from its gradient into that of `inner`, and `grad_g` gets g's gradient added."""
    start, noisy, (origin, stride) = first * BLOCK, d[6], stream(d[7])
    n = i32(min(last * BLOCK, d[5]) - start)
    inner, grad, place = floats(d[1] + 4 * start, (n,)), floats(d[2] + 4 * start, (n,)), np.uint32(d[8] + start)
    g, grad_g = floats(d[3] + 4 * start, (n,)), floats(d[4] + 4 * start, (n,))
    if noisy:
        for i in range(i32(0), n):
            u = uniform_of(np.uint32(origin + np.uint32(np.uint32(place + np.uint32(i)) * stride)))
            grad_g[i] += grad[i] * inner[i] * (ONE - u)
            mask = g[i] + (ONE - g[i]) * u
            inner[i] *= mask
            grad[i] *= mask
    else:
        for i in range(n):
            grad_g[i] += grad[i] * inner[i]
            inner[i] *= g[i]
            grad[i] *= g[i]


def divergence_forward(d: Any, first: int, last: int) -> None:
    """KL of each row (unit) of `logits` from its target row; target rows repeat every `period` rows. `lse` = log Σ exp of the row."""
    tokens, period = d[6], d[7]
    logits, target, share = floats(d[1], (d[0], tokens)), floats(d[2], (period, tokens)), floats(d[3], (period, tokens))
    out, lse = floats(d[4], (d[0],)), floats(d[5], (d[0],))
    for row in range(first, last):
        z, log_p, p = logits[row], target[row % period], share[row % period]
        top = highest(z)
        total = ZERO
        for t in range(tokens):
            total += exp(z[t] - top)
        norm = top + np.log(total)
        divergence = ZERO
        for t in range(tokens):
            divergence += p[t] * (log_p[t] - (z[t] - norm))
        out[row], lse[row] = divergence, norm


def divergence_backward(d: Any, first: int, last: int) -> None:
    """`out` = (softmax(logits) - share) times the row's gradient."""
    tokens, period = d[6], d[7]
    logits, share, out = floats(d[1], (d[0], tokens)), floats(d[2], (period, tokens)), floats(d[5], (d[0], tokens))
    lse, above = floats(d[3], (d[0],)), floats(d[4], (d[0],))
    for row in range(first, last):
        z, p, below, norm, a = logits[row], share[row % period], out[row], lse[row], above[row]
        for t in range(tokens):
            below[t] = a * (exp(z[t] - norm) - p[t])
