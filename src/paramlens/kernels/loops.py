"""Bodies of the compiled loops of `native`; imported only where Numba is.

A body takes `d`, the addresses and whole numbers that its caller packed (floats as their bits), and does units `first` to `last`;
its first lines unpack `d`. Loops over rows or numbers are innermost and contiguous, so that the compiler makes them vectors.
Sums may be reassociated, but NaN and infinity keep their meaning: a step that is not finite must be seen to be so.
"""

import ctypes
import math
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

OPTIONS: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "nogil": True, "error_model": "numpy"}
SLOTS = 24
"""Numbers in the packed argument."""
BLOCK = 4096
"""Numbers in one unit of an elementwise kernel."""

f32, i32 = np.float32, np.int32
HALF, ONE, ZERO = f32(0.5), f32(1), f32(0)
LEAK = f32(0.01)
LOG2_E, LN2_HIGH, LN2_LOW = f32(1 / math.log(2)), f32(0.693359375), f32(math.log(2) - 0.693359375)


def enabled() -> bool:
    return not numba.config.DISABLE_JIT  # pyright: ignore[reportAttributeAccessIssue]


def prefer_wide_vectors() -> None:
    """Have LLVM use 512-bit vectors where the processor has them; left to itself it stops at 256, and γ's loops take a fifth longer.

    Holds for all that this process compiles with Numba from now on; NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, where set, are obeyed.
    """
    config: Any = numba.config
    if config.CPU_NAME or config.CPU_FEATURES:
        return
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell on this system
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
    """The body `name` as a C function of one packed argument, which does its thread's share of the units."""
    body = njit(**OPTIONS)(globals()[name])
    thread, threads = (_first, _one) if openmp is None else (openmp.omp_get_thread_num, openmp.omp_get_num_threads)

    @cfunc(types.void(types.CPointer(types.int64)))
    def run(packed: Any) -> None:
        d = carray(packed, SLOTS, np.int64)
        i, n = thread(), threads()
        body(d, d[0] * i // n, d[0] * (i + 1) // n)

    return run


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@njit(inline="always")
def _floats(address: Any, shape: Any) -> Any:
    return carray(_pointer(address), shape, np.float32)  # pyright: ignore[reportCallIssue]


@njit(inline="always", **OPTIONS)
def _half_erf(v: Any) -> Any:
    """erf(v / √2) / 2: the normal distribution function less one half, to 2e-7; minimax rational fit on |v| <= 5.2, ±1/2 beyond."""
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
def _exp(v: Any) -> Any:
    """e^v for v <= 88, to 2e-7 of itself; 0 or next to it below -87. Minimax fit of the mantissa."""
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
def _density(v: Any) -> Any:
    """The normal density at v, e^(-v²/2) / √(2π), to 2e-7 of its maximum."""
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
def _share(v: Any, density: Any) -> Any:
    """The normal distribution function at v to 1e-7, given the density there (Abramowitz and Stegun, 26.2.17)."""
    t = ONE / (ONE + f32(0.2316419) * abs(v))
    q = f32(1.330274429)
    q = q * t + f32(-1.821255978)
    q = q * t + f32(1.781477937)
    q = q * t + f32(-0.356563782)
    q = q * t + f32(0.31938153)
    tail = density * (q * t)
    return tail if v < ZERO else ONE - tail


@njit(inline="always", **OPTIONS)
def _log(x: Any) -> Any:
    """Natural logarithm of a normal number > 0, to 2e-7: log m = 2 artanh((m - 1) / (m + 1)) for the mantissa m near 1."""
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


def mlps_forward(d: Any, first: int, last: int) -> None:
    """Σ_h gelu(z + b) w + b_out for each subcomponent (unit) and row; z (C h, rows) is x w_in, `out` (rows, C)."""
    rows, C, h = d[6], d[7], d[8]
    z, b, w = _floats(d[1], (C * h, rows)), _floats(d[2], (C * h,)), _floats(d[3], (C, h))
    b_out, out = _floats(d[4], (C,)), _floats(d[5], (rows, C))
    total = np.empty(rows, np.float32)
    for c in range(first, last):
        total[:] = b_out[c]
        for j in range(h):
            before, bias, weight = z[c * h + j], b[c * h + j], w[c, j]
            for r in range(rows):
                v = before[r] + bias
                total[r] += weight * v * (HALF + _half_erf(v))
        for r in range(rows):
            out[r, c] = total[r]


def mlps_backward(d: Any, first: int, last: int) -> None:
    """Gradients of `mlps_forward` from that of its result, `above` (rows, C): into z (overwritten), b, w and b_out (added to)."""
    rows, C, h = d[8], d[9], d[10]
    z, b, w = _floats(d[1], (C * h, rows)), _floats(d[2], (C * h,)), _floats(d[3], (C, h))
    above = _floats(d[4], (rows, C))
    grad_b, grad_w, grad_b_out = _floats(d[5], (C * h,)), _floats(d[6], (C, h)), _floats(d[7], (C,))
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
                density = _density(v)
                share = _share(v, density)
                to_weight += a[r] * v * share
                below = a[r] * weight * (share + v * density)
                to_bias += below
                before[r] = below
            grad_b[c * h + j] += to_bias
            grad_w[c, j] += to_weight


def scalar_mlps_forward(d: Any, first: int, last: int) -> None:
    """Σ_h gelu(x w_in + b) w + b_out for each subcomponent (unit) and row, x being that subcomponent's own number; all (rows, C)."""
    rows, C, h = d[7], d[8], d[9]
    x, out = _floats(d[1], (rows, C)), _floats(d[6], (rows, C))
    w_in, b, w, b_out = _floats(d[2], (C, h)), _floats(d[3], (C, h)), _floats(d[4], (C, h)), _floats(d[5], (C,))
    read, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for c in range(first, last):
        for r in range(rows):
            read[r] = x[r, c]
        total[:] = b_out[c]
        for j in range(h):
            scale, bias, weight = w_in[c, j], b[c, j], w[c, j]
            for r in range(rows):
                v = read[r] * scale + bias
                total[r] += weight * v * (HALF + _half_erf(v))
        for r in range(rows):
            out[r, c] = total[r]


def scalar_mlps_backward(d: Any, first: int, last: int) -> None:
    """Gradients of `scalar_mlps_forward` from that of its result, `above`: into `to_x`, and added to those of the parameters."""
    rows, C, h = d[11], d[12], d[13]
    x, above, to_x = _floats(d[1], (rows, C)), _floats(d[5], (rows, C)), _floats(d[6], (rows, C))
    w_in, b, w = _floats(d[2], (C, h)), _floats(d[3], (C, h)), _floats(d[4], (C, h))
    grad_w_in, grad_b, grad_w, grad_b_out = _floats(d[7], (C, h)), _floats(d[8], (C, h)), _floats(d[9], (C, h)), _floats(d[10], (C,))
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
                density = _density(v)
                share = _share(v, density)
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
    """`out` = gradient of `importance.lower` at `pre` for `grad`; a unit is BLOCK numbers."""
    start = first * BLOCK
    n = min(last * BLOCK, d[4]) - start
    pre, grad, out = _floats(d[1] + 4 * start, (n,)), _floats(d[2] + 4 * start, (n,)), _floats(d[3] + 4 * start, (n,))
    for i in range(n):
        v, above = pre[i], grad[i]
        leaking = LEAK * min(above, ZERO)
        inside = above if v <= ONE else ZERO
        out[i] = inside if v > ZERO else leaking


def minimality(d: Any, first: int, last: int) -> None:
    """`out`[unit] = Σ (upper(pre) + ε)^p - ε^p over its BLOCK numbers, those with pre <= 0 adding 0; `slope` = its derivative by pre."""
    floats = d.view(np.float64)
    out, p, eps = _floats(d[3], (d[0],)), f32(floats[5]), f32(floats[6])
    offset = f32(floats[6] ** floats[5])
    for unit in range(first, last):
        n = min(BLOCK, d[4] - unit * BLOCK)
        pre, slope = _floats(d[1] + 4 * BLOCK * unit, (n,)), _floats(d[2] + 4 * BLOCK * unit, (n,))
        total = ZERO
        for i in range(n):
            v = pre[i]
            x = max(v if v <= ONE else ONE + LEAK * (v - ONE), ZERO) + eps
            power = _exp(p * _log(x))
            cost = power - offset if v < f32(1e30) else v
            total += ZERO if v <= ZERO else cost
            inside = p * power / x
            kinked = inside if v <= ONE else LEAK * inside
            slope[i] = ZERO if v <= ZERO else kinked
        out[unit] = total


@njit(inline="always")
def _mixed(x: Any) -> Any:
    """A bijection of 64-bit numbers in which every bit of the argument moves every bit of the result (the finalizer of splitmix64)."""
    x = np.uint64(x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = np.uint64(x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.uint64(x ^ (x >> np.uint64(31)))


@njit(inline="always")
def _stream(key: Any) -> Any:
    """A key's walk through the 32-bit numbers: where it starts and its odd stride, both of the key mixed.

    Streams that differ in the start alone would be one sequence, shifted; with strides of their own, two of them meet in single places.
    """
    words = _mixed(np.uint64(key) + np.uint64(0x9E3779B97F4A7C15))
    return np.uint32(words), np.uint32(np.uint32(words >> np.uint64(32)) | np.uint32(1))


@njit(inline="always")
def _uniform(x: Any) -> Any:
    """A 32-bit number made uniform on the multiples of 2^-24 in [0, 1).

    A bijection of 32-bit numbers (multiply and shift) in which every bit of its argument moves every bit of its result.
    """
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    x = np.uint32(x ^ (x >> np.uint32(16)))
    return f32(i32(x >> np.uint32(8))) * f32(2**-24)


def uniform(d: Any, first: int, last: int) -> None:
    """`out`[i] = the noise of place i under a key; a unit is BLOCK numbers."""
    start, (origin, stride) = first * BLOCK, _stream(d[3])
    n = i32(min(last * BLOCK, d[2]) - start)
    out, place = _floats(d[1] + 4 * start, (n,)), np.uint32(start)
    for i in range(i32(0), n):
        out[i] = _uniform(np.uint32(origin + np.uint32(np.uint32(place + np.uint32(i)) * stride)))


def mask_forward(d: Any, first: int, last: int) -> None:
    """`inner` *= g, or g + (1 - g) u with u the noise of its place, from `origin` on, under a key; in place."""
    start, noisy, (origin, stride) = first * BLOCK, d[4], _stream(d[5])
    n = i32(min(last * BLOCK, d[3]) - start)
    inner, g, place = _floats(d[1] + 4 * start, (n,)), _floats(d[2] + 4 * start, (n,)), np.uint32(d[6] + start)
    if noisy:
        for i in range(i32(0), n):
            u = _uniform(np.uint32(origin + np.uint32(np.uint32(place + np.uint32(i)) * stride)))
            inner[i] *= g[i] + (ONE - g[i]) * u
    else:
        for i in range(n):
            inner[i] *= g[i]


def mask_backward(d: Any, first: int, last: int) -> None:
    """From inner activations and the gradient above the mask: `inner` becomes the masked one, `grad` that of the inner, g's is added to."""
    start, noisy, (origin, stride) = first * BLOCK, d[6], _stream(d[7])
    n = i32(min(last * BLOCK, d[5]) - start)
    inner, grad, place = _floats(d[1] + 4 * start, (n,)), _floats(d[2] + 4 * start, (n,)), np.uint32(d[8] + start)
    g, grad_g = _floats(d[3] + 4 * start, (n,)), _floats(d[4] + 4 * start, (n,))
    if noisy:
        for i in range(i32(0), n):
            u = _uniform(np.uint32(origin + np.uint32(np.uint32(place + np.uint32(i)) * stride)))
            grad_g[i] += grad[i] * inner[i] * (ONE - u)
            mask = g[i] + (ONE - g[i]) * u
            inner[i] *= mask
            grad[i] *= mask
    else:
        for i in range(n):
            grad_g[i] += grad[i] * inner[i]
            inner[i] *= g[i]
            grad[i] *= g[i]


@njit(inline="always")
def _ordered(bits: Any) -> Any:
    """The bits of a float as a whole number of the same order, and back."""
    return i32(bits ^ ((bits >> i32(31)) & i32(0x7FFFFFFF)))


@njit(inline="always", **OPTIONS)
def _highest(z: Any) -> Any:
    """Largest number of a row, found among whole numbers, whose maximum is a vector operation."""
    bits = z.view(np.int32)
    top = _ordered(bits[0])
    for t in range(len(bits)):
        top = max(top, _ordered(bits[t]))
    return _ordered(top).view(np.float32)


def divergence_forward(d: Any, first: int, last: int) -> None:
    """KL of each row (unit) of `logits` from its target row, those repeating every `period` rows; `lse` = log Σ exp of the row."""
    tokens, period = d[6], d[7]
    logits, target, share = _floats(d[1], (d[0], tokens)), _floats(d[2], (period, tokens)), _floats(d[3], (period, tokens))
    out, lse = _floats(d[4], (d[0],)), _floats(d[5], (d[0],))
    for row in range(first, last):
        z, log_p, p = logits[row], target[row % period], share[row % period]
        top = _highest(z)
        total = ZERO
        for t in range(tokens):
            total += _exp(z[t] - top)
        norm = top + np.log(total)
        divergence = ZERO
        for t in range(tokens):
            divergence += p[t] * (log_p[t] - (z[t] - norm))
        out[row], lse[row] = divergence, norm


def divergence_backward(d: Any, first: int, last: int) -> None:
    """`out` = (softmax(logits) - p) times the row's gradient."""
    tokens, period = d[6], d[7]
    logits, share, out = _floats(d[1], (d[0], tokens)), _floats(d[2], (period, tokens)), _floats(d[5], (d[0], tokens))
    lse, above = _floats(d[3], (d[0],)), _floats(d[4], (d[0],))
    for row in range(first, last):
        z, p, below, norm, a = logits[row], share[row % period], out[row], lse[row], above[row]
        for t in range(tokens):
            below[t] = a * (_exp(z[t] - norm) - p[t])
