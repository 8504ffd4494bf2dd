# SPDX-License-Identifier: Apache-2.0
"""Device functions that every kernel shares: IEEE arithmetic, storage types, tiles.

The interpreter and the compiled kernel must agree bit for bit, which rules out what either of them gets wrong:

* ``/`` compiles to an approximate division in fp32: :func:`divide`;
* a bf16 conversion truncates in the interpreter: bf16 travels as int16 and is converted by integer code;
* a literal ``-0.0`` becomes +0 in Triton's constants: no kernel adds one, an absent term is left out instead;
* ``range`` over an argument fails in the interpreter under NumPy 2.4: loops are written with ``while``;
* ``tl.max`` drops NaN: magnitudes are compared as integers, where NaN is the largest (:func:`magnitude_bits`).
"""

import triton
import triton.language as tl


@triton.jit
def double_from_bits(bits, dtype: tl.constexpr):
    """A double that came as the integer of its bits (Triton's own float arguments are fp32), in `dtype`."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def divide(a, b):
    """a / b as IEEE defines it."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(v):
    """The square root as IEEE defines it."""
    if v.dtype == tl.float64:
        return tl.sqrt(v)
    else:
        return tl.sqrt_rn(v)


@triton.jit
def copy_sign(magnitude, sign):
    """The magnitude (not negative) with the sign bit of `sign`."""
    if magnitude.dtype == tl.float64:
        top = sign.to(tl.uint64, bitcast=True) & 0x8000000000000000
        return (magnitude.to(tl.uint64, bitcast=True) | top).to(tl.float64, bitcast=True)
    else:
        top = sign.to(tl.uint32, bitcast=True) & 0x80000000
        return (magnitude.to(tl.uint32, bitcast=True) | top).to(tl.float32, bitcast=True)


@triton.jit
def round_even(v):
    """Nearest integer, ties to even. From 2^23 (2^52) on all values are integers; below, adding it rounds."""
    magic: tl.constexpr = 4503599627370496.0 if v.dtype == tl.float64 else 8388608.0
    a = tl.abs(v)
    t = (a + magic) - magic
    return copy_sign(tl.where(a < magic, t, a), v)


@triton.jit
def bfloat16_bits(v):
    """fp32 to the bits of bf16: nearest, ties to even, subnormals kept, NaN quiet (csrc/math/convert.h)."""
    u = v.to(tl.uint32, bitcast=True)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    nan = ((u >> 16) & 0x8000) | 0x7FC0
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, nan, rounded).to(tl.int16)


@triton.jit
def widen(raw):
    """Storage to arithmetic: int16 holds bf16."""
    if raw.dtype == tl.int16:
        return (raw.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif raw.dtype == tl.float64:
        return raw
    else:
        return raw.to(tl.float32)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """Arithmetic to storage. fp64 goes to 16 bits through fp32, as torch does."""
    if dtype == tl.int16:
        return bfloat16_bits(v.to(tl.float32))
    elif dtype == tl.float16:
        return v.to(tl.float32).to(tl.float16)
    else:
        return v.to(dtype)


@triton.jit
def load(ptr, offsets, mask, dtype: tl.constexpr, MASKED: tl.constexpr):
    """Data in the arithmetic type `dtype`; 0 where the mask is off."""
    if MASKED:
        return widen(tl.load(ptr + offsets, mask=mask, other=0)).to(dtype)
    else:
        return widen(tl.load(ptr + offsets)).to(dtype)


@triton.jit
def store(ptr, offsets, v, mask, MASKED: tl.constexpr):
    """Write v in the storage type of the pointer."""
    raw = narrow(v, ptr.dtype.element_ty)
    if MASKED:
        tl.store(ptr + offsets, raw, mask=mask)
    else:
        tl.store(ptr + offsets, raw)


@triton.jit
def magnitude_bits(v):
    """|v| as an integer with the same order; NaN above everything."""
    if v.dtype == tl.float64:
        return v.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def magnitude_value(bits):
    """The number whose :func:`magnitude_bits` these are."""
    if bits.dtype == tl.int64:
        return bits.to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def program(WIDE: tl.constexpr):
    """Number of this program, in 64 bits where offsets need them."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    return pid


@triton.jit
def run_tile(span, BLOCK: tl.constexpr, RUN: tl.constexpr):
    """BLOCK consecutive elements, in runs of RUN that share a scale, of `span` = (start, n, inner, channels).

    Gives offsets, scale index, and which elements are below n."""
    start, n, inner, channels = span
    if RUN == BLOCK:
        offsets = start + tl.arange(0, BLOCK)
        index = (start // inner) % channels
    else:
        first = start + tl.arange(0, BLOCK // RUN)[:, None] * RUN
        offsets = first + tl.arange(0, RUN)[None, :]
        index = (first // inner) % channels
    return offsets, index, offsets < n
