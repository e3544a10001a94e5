"""Bodies of the compiled loops of `native`, and the functions that they use; imported only if Numba is installed.

A body takes the addresses and integers that its caller packed (floats as their bits) and computes its thread's share of the units,
`first` to `last`; its first lines unpack them. Loops over rows or numbers are innermost and contiguous, so that the compiler vectorises
them. Sums may be reassociated, but NaN and infinity keep their meaning, so that a step that is not finite is detected.

All that goes into the machine code is in this file: Numba keeps the code for later processes until this file changes.
"""

import math
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

SLOTS = 24
"""Number of 64-bit words in the packed argument; the last says whether the loop runs on OpenMP's threads."""
BLOCK = 4096
"""How many numbers one unit of an elementwise kernel has."""
OPTIONS: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy"}
THREAD, THREADS = "paramlens_thread", "paramlens_threads"
"""Symbols of OpenMP's functions for the number of this thread and of all threads, which `compiler` makes known."""

f32, i32 = np.float32, np.int32
HALF, ONE, ZERO = f32(0.5), f32(1), f32(0)
LEAK = f32(0.01)
LOG2_E, LN2_HIGH, LN2_LOW = f32(1 / math.log(2)), f32(0.693359375), f32(math.log(2) - 0.693359375)


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


_thread, _threads = types.ExternalFunction(THREAD, types.int32()), types.ExternalFunction(THREADS, types.int32())


@njit(inline="always")
def unpacked(packed: Any) -> Any:
    """The packed words, and the first and the last + 1 of this thread's units."""
    d = carray(packed, SLOTS, np.int64)
    if d[SLOTS - 1] == 0:
        return d, 0, d[0]
    i, n = _thread(), _threads()
    return d, d[0] * i // n, d[0] * (i + 1) // n


@njit(inline="always")
def floats(address: Any, shape: Any) -> Any:
    return carray(_pointer(address), shape, np.float32)  # pyright: ignore[reportCallIssue]


@njit(inline="always", **OPTIONS)
def half_erf(v: Any) -> Any:
    """erf(v / √2) / 2, the normal distribution function minus 1/2, with error 2e-7. Rational minimax fit on |v| <= 5.2, ±1/2 beyond."""
    t = min(v * v, f32(27.04))
    p = f32(5.84073621e-06)
    p = p * t + f32(0.000314269348)
    p = p * t + f32(0.00551876954)
    p = p * t + f32(0.0495939891)
    p = p * t + f32(0.398941917)
    q = f32(5.01908346e-07)
    q = q * t + f32(0.000112743088)
    q = q * t + f32(0.00270378085)
    q = q * t + f32(0.0373401451)
    q = q * t + f32(0.29097446)
    return min(max(v * p / (q * t + ONE), -HALF), HALF)


@njit(inline="always", **OPTIONS)
def exp(v: Any) -> Any:
    """e^v for v <= 88, with relative error 2e-7; 0 or almost 0 below -87. Minimax fit of the mantissa."""
    x = max(v, f32(-87))
    k = np.rint(x * LOG2_E)
    f = (x - k * LN2_HIGH) - k * LN2_LOW
    p = f32(0.00138146162)
    p = p * f + f32(0.00836871146)
    p = p * f + f32(0.0416683874)
    p = p * f + f32(0.166665207)
    p = p * f + f32(0.499999935)
    mantissa = p * f * f + f + ONE
    return mantissa * i32((i32(k) + i32(127)) << i32(23)).view(np.float32)


@njit(inline="always", **OPTIONS)
def normal_density(v: Any) -> Any:
    """The normal density at v, e^(-v²/2) / √(2π), with error 2e-7 of its maximum."""
    y = max(v * (v * (-HALF * LOG2_E)), f32(-100))
    k = np.rint(y)
    f = y - k
    p = f32(0.000529653689)
    p = p * f + f32(0.00385999173)
    p = p * f + f32(0.0221441431)
    p = p * f + f32(0.0958343905)
    p = p * f + f32(0.276525632)
    p = p * f + f32(0.398942309)
    return i32(f32(p).view(np.int32) + i32(i32(k) << i32(23))).view(np.float32)


@njit(inline="always", **OPTIONS)
def normal_share(v: Any, density: Any) -> Any:
    """The normal distribution function at v with error 1e-7, from the density at v (Abramowitz and Stegun, 26.2.17)."""
    t = ONE / (ONE + f32(0.2316419) * abs(v))
    q = f32(1.330274429)
    q = q * t + f32(-1.821255978)
    q = q * t + f32(1.781477937)
    q = q * t + f32(-0.356563782)
    q = q * t + f32(0.31938153)
    tail = density * (q * t)
    return tail if v < ZERO else ONE - tail


@njit(inline="always", **OPTIONS)
def log(x: Any) -> Any:
    """Natural logarithm of a normal float > 0, with error 2e-7: log m = 2 artanh((m - 1) / (m + 1)) for the mantissa m near 1."""
    bits = f32(x).view(np.int32)
    exponent = i32((bits - i32(0x3F3504F3)) >> i32(23))
    m = i32(bits - i32(exponent << i32(23))).view(np.float32)
    s = (m - ONE) / (m + ONE)
    t = s * s
    series = f32(2 / 9)
    series = series * t + f32(2 / 7)
    series = series * t + f32(2 / 5)
    series = series * t + f32(2 / 3)
    k = f32(exponent)
    return (series * t + f32(2)) * s + (k * LN2_LOW + k * LN2_HIGH)


@njit(inline="always")
def _mixed(x: Any) -> Any:
    """A bijection of 64-bit numbers in which every bit of the argument affects every bit of the result (the finalizer of splitmix64)."""
    x = np.uint64(x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = np.uint64(x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.uint64(x ^ (x >> np.uint64(31)))


@njit(inline="always")
def stream(key: Any) -> Any:
    """A key's sequence of 32-bit numbers: its start and its odd stride, both mixed from the key.

    With one common stride, all streams would be one sequence, shifted; with different strides, two streams share only single numbers.
    """
    words = _mixed(np.uint64(key) + np.uint64(0x9E3779B97F4A7C15))
    return np.uint32(words), np.uint32(np.uint32(words >> np.uint64(32)) | np.uint32(1))


@njit(inline="always")
def uniform_of(x: Any) -> Any:
    """Turn a 32-bit number into a uniform multiple of 2^-24 in [0, 1).

    It uses a bijection of 32-bit numbers (multiply and shift) in which every bit of the argument affects every bit of the result.
    """
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    x = np.uint32(x ^ (x >> np.uint32(16)))
    return f32(i32(x >> np.uint32(8))) * f32(2**-24)


@njit(inline="always")
def _ordered(bits: Any) -> Any:
    """The bits of a float as an integer that sorts like the float; its own inverse."""
    return i32(bits ^ ((bits >> i32(31)) & i32(0x7FFFFFFF)))


@njit(inline="always", **OPTIONS)
def highest(z: Any) -> Any:
    """Largest number of a row, computed with integers, for which the compiler vectorises the maximum."""
    bits = z.view(np.int32)
    top = _ordered(bits[0])
    for t in range(len(bits)):
        top = max(top, _ordered(bits[t]))
    return _ordered(top).view(np.float32)


def mlps_forward(packed: Any) -> None:
    """Σ_h gelu(z + b) w + b_out for each subcomponent (unit) and row; z (C h, rows) is x w_in, `out` (rows, C)."""
    d, first, last = unpacked(packed)
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


def mlps_backward(packed: Any) -> None:
    """Gradients of `mlps_forward` from that of its result, `above` (rows, C): written into z, added to those of b, w and b_out."""
    d, first, last = unpacked(packed)
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


def scalar_mlps_forward(packed: Any) -> None:
    """Σ_h gelu(x w_in + b) w + b_out for each subcomponent (unit) and row; x is the subcomponent's own number, x and `out` (rows, C)."""
    d, first, last = unpacked(packed)
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


def scalar_mlps_backward(packed: Any) -> None:
    """Gradients of `scalar_mlps_forward` from that of its result, `above`: written into `to_x`, added to those of the parameters."""
    d, first, last = unpacked(packed)
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


def lower_backward(packed: Any) -> None:
    """`out` = `grad` times the slope of `lower` at `pre`; a unit is BLOCK numbers."""
    d, first, last = unpacked(packed)
    start = first * BLOCK
    n = min(last * BLOCK, d[4]) - start
    pre, grad, out = floats(d[1] + 4 * start, (n,)), floats(d[2] + 4 * start, (n,)), floats(d[3] + 4 * start, (n,))
    for i in range(n):
        v, above = pre[i], grad[i]
        leaking = LEAK * min(above, ZERO)
        inside = above if v <= ONE else ZERO
        out[i] = inside if v > ZERO else leaking


def minimality(packed: Any) -> None:
    """`out`[unit] = Σ ((upper(pre) + ε)^p - ε^p) over its BLOCK numbers, 0 where pre <= 0; `slope` = the derivative by pre."""
    d, first, last = unpacked(packed)
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


def uniform(packed: Any) -> None:
    """`out`[i] = the noise of a key at index i; a unit is BLOCK numbers."""
    d, first, last = unpacked(packed)
    start, (origin, stride) = first * BLOCK, stream(d[3])
    n = i32(min(last * BLOCK, d[2]) - start)
    out, place = floats(d[1] + 4 * start, (n,)), np.uint32(start)
    for i in range(i32(0), n):
        out[i] = uniform_of(np.uint32(origin + np.uint32(np.uint32(place + np.uint32(i)) * stride)))


def mask_forward(packed: Any) -> None:
    """`inner` *= g, or with a key g + (1 - g) u, where u is the key's noise at its index; in place."""
    d, first, last = unpacked(packed)
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


def mask_backward(packed: Any) -> None:
    """`inner` becomes the masked activation, `grad` turns from its gradient into that of `inner`, and `grad_g` gets g's gradient added."""
    d, first, last = unpacked(packed)
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


def divergence_forward(packed: Any) -> None:
    """KL of each row (unit) of `logits` from its target row; target rows repeat every `period` rows. `lse` = log Σ exp of the row."""
    d, first, last = unpacked(packed)
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


def divergence_backward(packed: Any) -> None:
    """`out` = (softmax(logits) - share) times the row's gradient."""
    d, first, last = unpacked(packed)
    tokens, period = d[6], d[7]
    logits, share, out = floats(d[1], (d[0], tokens)), floats(d[2], (period, tokens)), floats(d[5], (d[0], tokens))
    lse, above = floats(d[3], (d[0],)), floats(d[4], (d[0],))
    for row in range(first, last):
        z, p, below, norm, a = logits[row], share[row % period], out[row], lse[row], above[row]
        for t in range(tokens):
            below[t] = a * (exp(z[t] - norm) - p[t])
