"""What a quad of lanes puts into a matrix instruction for tiles.py: integers as they lie in the bytes, and scales.

[Note: Integers]
The bits of an integer below 256 are, as bfloat16, that many times 2^-133: the subnormal numbers and the first normal
ones lie on one line. The matrix instruction counts them in full, and x is multiplied by 2^64 in turn, so that nothing
has to be put into the exponents and nothing taken off again but the type's own zero point. A nibble need not even be
shifted down: where it stands four bits higher, x is multiplied by 2^60. (An x of 2^64 or more becomes infinite, where
a float32 sum of such products would be next to that.)

As in fragments.py, a lane takes the same share of every *group* of elements that have a scale of their own, in *runs*
of four: bytes 4 c to 4 c + 3 of each 16 for lane c of a quad, or 8 c to 8 c + 7 of each 32. A *unit* is some groups of
a block, which are unpacked together.

    head(src, c, magic, AT, ALIGN) -> state, d, minus, minima
    unit(src, c, state, magic, U, AT, ALIGN) -> runs, scales

`src` is a multiple of ALIGN and the block lies at src + AT, in shared or in global memory (staging.py). `runs` has two
words for each run, bytes 0 and 2 and bytes 1 and 3 of four, each pair as two bfloat16. The weight is
d scale_j (q - zero) + minus minimum_j, of which `scales` has a number for each group of the unit, and `minima` the
integers minimum_2c and minimum_(2c+1) in the halves of a word.

Layouts: blocks32.py and kquants.py.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .bits import f16, field, minus_f16
from .staging import half, quad, word, words


class Place(NamedTuple):
    """Of each unit of a block the first element of each run of lane 0; the power of two by which the integers of the
    runs are too large, the same for every unit; and of each unit the numbers of its groups in the block."""

    offsets: tuple[tuple[int, ...], ...]
    ups: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]


NIBBLES_OF_32 = Place(((0, 16),), (0, 4), ((0,),))
BYTES_OF_32 = Place(((0, 16),), (0, 0), ((0,),))
NIBBLES_OF_64 = Place(
    tuple((64 * u, 64 * u + 4, 64 * u + 32, 64 * u + 36) for u in range(4)),
    (0, 0, 4, 4),
    tuple((2 * u, 2 * u + 1) for u in range(4)),
)
QUARTERS_OF_128 = Place(  # unit u is 16 of the 32 elements of each quarter of half u // 2
    tuple(tuple(128 * (u // 2) + 16 * (u % 2) + 32 * k for k in range(4)) for u in range(4)),
    (0, 0, 0, 0),
    tuple(tuple(8 * (u // 2) + u % 2 + 2 * k for k in range(4)) for u in range(4)),
)


@triton.jit
def pairs(w, AT: tl.constexpr, BITS: tl.constexpr):
    """The fields at bit AT of the four bytes of `w`, bytes 0 and 2 and bytes 1 and 3, where they stand."""
    MASK: tl.constexpr = (((1 << BITS) - 1) << AT) * 0x00010001
    return w & MASK, (w >> 8) & MASK


@triton.jit
def merged(w, high, MASK: tl.constexpr):
    """The bits of `w` that MASK has, and for the others those of `high`, in one instruction."""
    return high ^ ((w ^ high) & MASK)


@triton.jit
def d_head(src, c, magic, AT: tl.constexpr, ALIGN: tl.constexpr):
    return (), (f16(half(src, AT, ALIGN)),), (), ()


@triton.jit
def q4_0(src, c, state, magic, U: tl.constexpr, AT: tl.constexpr, ALIGN: tl.constexpr):
    w = word(src + c * 4, AT + 2, min(ALIGN, 4))
    return pairs(w, 0, 4) + pairs(w, 4, 4), ()


@triton.jit
def flipped(w):
    """Signed bytes, 128 added to each."""
    return (w ^ 0x00800080) & 0x00FF00FF, ((w >> 8) ^ 0x00800080) & 0x00FF00FF


@triton.jit
def q8_0(src, c, state, magic, U: tl.constexpr, AT: tl.constexpr, ALIGN: tl.constexpr):
    a = word(src + c * 4, AT + 2, min(ALIGN, 4))
    b = word(src + c * 4, AT + 18, min(ALIGN, 4))
    return flipped(a) + flipped(b), ()


@triton.jit
def q4_k_head(src, c, magic, AT: tl.constexpr, ALIGN: tl.constexpr):
    """The state is the scales, four to a word."""
    dd, w0, w1, w2 = quad(src, AT, ALIGN)
    scales = w0 & 0x3F3F3F3F, (w2 & 0x0F0F0F0F) | ((w0 >> 2) & 0x30303030)
    minima = tl.where(c < 2, w1 & 0x3F3F3F3F, ((w2 >> 4) & 0x0F0F0F0F) | ((w1 >> 2) & 0x30303030))
    minima = minima >> (c % 2 * 16)
    two = (minima & 0xFF) | ((minima << 8) & 0xFF0000)
    return scales, (f16(dd),), (minus_f16(dd >> 16),), (two,)


@triton.jit
def q4_k(src, c, state, magic, U: tl.constexpr, AT: tl.constexpr, ALIGN: tl.constexpr):
    magic = 0x4B000000 + magic
    a, b = words(src + c * 8, AT + 16 + 32 * U, min(ALIGN, 8))
    scales = state[U // 2]
    runs = pairs(a, 0, 4) + pairs(b, 0, 4) + pairs(a, 4, 4) + pairs(b, 4, 4)
    return runs, (field(scales, magic, U % 2 * 16, 6), field(scales, magic, U % 2 * 16 + 8, 6))


@triton.jit
def q6_k_head(src, c, magic, AT: tl.constexpr, ALIGN: tl.constexpr):
    """The state is the scales, 128 added to each, four to a word."""
    FLIP: tl.constexpr = -0x7F7F7F80  # 0x80808080
    s0, s1, s2, s3 = quad(src, AT + 192, ALIGN)
    return (s0 ^ FLIP, s1 ^ FLIP, s2 ^ FLIP, s3 ^ FLIP), (f16(half(src, AT + 208, ALIGN)),), (), ()


@triton.jit
def q6_k(src, c, state, magic, U: tl.constexpr, AT: tl.constexpr, ALIGN: tl.constexpr):
    """ql of the first and third quarter's elements, of the second and fourth's, and qh, which all share."""
    magic = 0x4B000000 + magic
    a = word(src + c * 4, AT + U // 2 * 64 + U % 2 * 16, min(ALIGN, 4))
    b = word(src + c * 4, AT + U // 2 * 64 + U % 2 * 16 + 32, min(ALIGN, 4))
    high = word(src + c * 4, AT + 128 + U // 2 * 32 + U % 2 * 16, min(ALIGN, 4))
    runs = (
        pairs(merged(a, high << 4, 0x0F0F0F0F), 0, 6)
        + pairs(merged(b, high << 2, 0x0F0F0F0F), 0, 6)
        + pairs(merged(a >> 4, high, 0x0F0F0F0F), 0, 6)
        + pairs(merged(b >> 4, high >> 2, 0x0F0F0F0F), 0, 6)
    )
    BYTE: tl.constexpr = U % 2 * 8
    scales = (
        field(state[U // 2 * 2], magic, BYTE, 8, MINUS=128),
        field(state[U // 2 * 2], magic, BYTE + 16, 8, MINUS=128),
        field(state[U // 2 * 2 + 1], magic, BYTE, 8, MINUS=128),
        field(state[U // 2 * 2 + 1], magic, BYTE + 16, 8, MINUS=128),
    )
    return runs, scales
