# SPDX-License-Identifier: Apache-2.0
"""The random draws of ``csrc/math/philox.h`` and ``noise.h``: the same bits, compiled and interpreted.

A state is the tuple that :func:`load_state` makes of an int64 tensor ``[seed, offset]``. The ``_run`` functions draw
for consecutive elements and share each draw between the elements of its block; the ``_at`` functions draw for any
elements, each by itself: the same values at eight (four) times the work.
"""

import triton
import triton.language as tl

from ._elementary import cosine_of_right_angles, log_of_normal, sine_of_right_angles


@triton.jit
def load_state(state_ptr):
    """Seed and offset as four words of 32 bits, low words first."""
    seed, offset = tl.load(state_ptr), tl.load(state_ptr + 1)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32), offset.to(tl.uint32), (offset >> 32).to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four words from four counter words and two key words, all uint32."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(state, block):
    """The four words of each block; `block` is int32 or int64, not negative."""
    seed_low, seed_high, offset_low, offset_high = state
    low = block.to(tl.uint32)
    if block.dtype == tl.int64:
        high = (block >> 32).to(tl.uint32)
    else:
        high = low * 0
    return philox(low, high, low * 0 + offset_low, low * 0 + offset_high, seed_low, seed_high)


@triton.jit
def uniform_value(k):
    """u of 16 bits."""
    return (k.to(tl.int32).to(tl.float32) + 0.5) * 1.52587890625e-05


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two draws of N(0, 1/12) from two words: the even element's and the odd one's."""
    u = ((radius_word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    radius = tl.sqrt_rn(log_of_normal(u, 0.0) * -0.16666667)
    step = ((angle_word >> 7) & 0x7FFFFF).to(tl.int32) - 0x400000
    f = (step.to(tl.float32) + 0.5) * 1.1920928955078125e-07
    sine, cosine = sine_of_right_angles(f), cosine_of_right_angles(f)
    swap = ((angle_word >> 30) & 1) != 0
    turned = angle_word & 0x80000000
    even = tl.where(swap, sine, cosine).to(tl.uint32, bitcast=True) ^ turned ^ ((angle_word << 1) & 0x80000000)
    odd = tl.where(swap, cosine, sine).to(tl.uint32, bitcast=True) ^ turned
    return even.to(tl.float32, bitcast=True) * radius, odd.to(tl.float32, bitcast=True) * radius


@triton.jit
def uniform_at(state, index):
    """u in (0, 1), fp32, of the elements `index`."""
    w0, w1, w2, w3 = words(state, index >> 3)
    j = index & 7
    word = tl.where(j < 4, tl.where(j < 2, w0, w1), tl.where(j < 6, w2, w3))
    return uniform_value(tl.where((j & 1) != 0, word >> 16, word & 0xFFFF))


@triton.jit
def normal_at(state, index):
    """xi ~ N(0, 1/12), fp32, of the elements `index`."""
    w0, w1, w2, w3 = words(state, index >> 2)
    second = (index & 2) != 0
    even, odd = normal_pair(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where((index & 1) != 0, odd, even)


@triton.jit
def uniform_run(state, first, COUNT: tl.constexpr):
    """u in (0, 1), fp32 [COUNT], of the elements from `first` on; both are multiples of 8, COUNT a power of two. With
    `first` [R, 1] the draws of R such runs, [R, COUNT]."""
    block = (first >> 3) + tl.arange(0, COUNT // 8)
    w0, w1, w2, w3 = words(state, block)
    drawn = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return uniform_value(tl.interleave(drawn & 0xFFFF, drawn >> 16))


@triton.jit
def normal_run(state, first, COUNT: tl.constexpr):
    """xi ~ N(0, 1/12), fp32 [COUNT], of the elements from `first` on; both are multiples of 4, COUNT a power of two.
    With `first` [R, 1] the draws of R such runs, [R, COUNT]."""
    block = (first >> 2) + tl.arange(0, COUNT // 4)
    w0, w1, w2, w3 = words(state, block)
    even0, odd0 = normal_pair(w0, w1)
    even1, odd1 = normal_pair(w2, w3)
    return tl.interleave(tl.interleave(even0, even1), tl.interleave(odd0, odd1))
