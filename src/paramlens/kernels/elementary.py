"""Functions that the bodies in `loops` use: arrays at an address, and scalar functions that the compiler vectorises."""

import math
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

OPTIONS: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "nogil": True, "error_model": "numpy"}

f32, i32 = np.float32, np.int32
HALF, ONE, ZERO = f32(0.5), f32(1), f32(0)
LEAK = f32(0.01)
LOG2_E, LN2_HIGH, LN2_LOW = f32(1 / math.log(2)), f32(0.693359375), f32(math.log(2) - 0.693359375)


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


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
