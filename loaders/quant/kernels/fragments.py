"""What a quad of lanes puts into a matrix instruction for each type: pairs of integers, and the scales behind them.

[Note: Fragments]
A *unit* is 32 to 64 elements of one row of the weight, given to a *quad*, the four lanes c = 0..3 that a matrix
instruction sums over; `UNITS` units make a block. An instruction takes four elements of each lane, a *run*, and all
elements that one accumulator sums share a scale. A lane therefore takes the same share of every sub-block: bytes 4 c to
4 c + 3 of each 16, or 8 c to 8 c + 7 of each 32. Which elements these are matters to nobody, as long as the same ones
are taken of x: `places` gives the first element of each run.

    places(unit, c) -> at, offsets
    decode(src, unit, c, magic, ALIGN) -> runs, signs, scale, d, minimum, minus

`runs` has two words for each run: bytes 0 and 2 and bytes 1 and 3 of a four-byte word of quants, each pair as two
bfloat16. A bfloat16 of exponent 2^7 has a mantissa of 7 bits, 128 + q for any q < 128: `magic` puts the exponents of
both in as the fields are masked out. What must be taken off again, 128 and the type's own zero point, is the same for
all elements and is taken off the sum (the constant that stands beside the type in quads.py). Types of eight bits have
`signs`, a second pair of bfloat16 for each of the first: -128 or, for a negative number, -256, which two's complement
makes of 128 + the low seven bits the number itself.
The others are as in programs.py [Note: Decoders], for one or two sub-blocks (Q2_K, Q3_K: four) of as many runs each.

Layouts: blocks32.py and kquants.py.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

from .bits import byte, f16, field, half, minus_f16, quad, word, words


@triton.jit
def pairs(w, magic, AT: tl.constexpr, BITS: tl.constexpr):
    """The fields at bit AT of the four bytes of `w`, bytes 0 and 2 and bytes 1 and 3, as 128 + field in bfloat16."""
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x00010001
    return ((w >> AT) & MASK) ^ magic, ((w >> (AT + 8)) & MASK) ^ magic


@triton.jit
def nibbles_16(unit, c):
    return c * 4, (0, 16)


@triton.jit
def q4_0(src, unit, c, magic, ALIGN: tl.constexpr):
    d = f16(half(src, ALIGN))
    w = word(src + 2 + c * 4, ALIGN)
    return pairs(w, magic, 0, 4) + pairs(w, magic, 4, 4), (), (), (d,), (), ()


@triton.jit
def q4_1(src, unit, c, magic, ALIGN: tl.constexpr):
    dm = word(src, ALIGN)
    w = word(src + 4 + c * 4, ALIGN)
    return pairs(w, magic, 0, 4) + pairs(w, magic, 4, 4), (), (), (f16(dm),), (), (f16(dm >> 16),)


@triton.jit
def five_bits(w, low, high, magic):
    """The low and the high nibbles of `w`, their fifth bits the low four bits of `low` and of `high`."""
    low = ((low & 15) * 0x02040810) & 0x10101010
    high = ((high & 15) * 0x02040810) & 0x10101010
    return pairs((w & 0x0F0F0F0F) | low, magic, 0, 5) + pairs(((w >> 4) & 0x0F0F0F0F) | high, magic, 0, 5)


@triton.jit
def q5_0(src, unit, c, magic, ALIGN: tl.constexpr):
    d = f16(half(src, ALIGN))
    high = word(src + 2, ALIGN) >> (c * 4)
    w = word(src + 6 + c * 4, ALIGN)
    return five_bits(w, high, high >> 16, magic), (), (), (d,), (), ()


@triton.jit
def q5_1(src, unit, c, magic, ALIGN: tl.constexpr):
    dm = word(src, ALIGN)
    high = word(src + 4, ALIGN) >> (c * 4)
    w = word(src + 8 + c * 4, ALIGN)
    return five_bits(w, high, high >> 16, magic), (), (), (f16(dm),), (), (f16(dm >> 16),)


@triton.jit
def bytes_32(unit, c):
    return c * 8, (0, 4)


@triton.jit
def sign_pairs(w):
    return (w & 0x00800080) ^ -0x3CFF3D00, ((w >> 8) & 0x00800080) ^ -0x3CFF3D00  # 0xC300C300


@triton.jit
def q8_0(src, unit, c, magic, ALIGN: tl.constexpr):
    d = f16(half(src, ALIGN))
    a, b = words(src + 2 + c * 8, ALIGN)
    return pairs(a, magic, 0, 7) + pairs(b, magic, 0, 7), sign_pairs(a) + sign_pairs(b), (), (d,), (), ()


@triton.jit
def bytes_128(unit, c):
    return unit * 128 + c * 8, (0, 4, 32, 36, 64, 68, 96, 100)


@triton.jit
def six_bits(src, h, magic, ALIGN: tl.constexpr):
    """d and minus dmin, and the scales and mins of the four sub-blocks of half h: kquants.py has the layout."""
    dd, w0, w1, w2 = quad(src, ALIGN)
    s = tl.where(h == 1, (w2 & 0x0F0F0F0F) | ((w0 >> 2) & 0x30303030), w0 & 0x3F3F3F3F)
    m = tl.where(h == 1, ((w2 >> 4) & 0x0F0F0F0F) | ((w1 >> 2) & 0x30303030), w1 & 0x3F3F3F3F)
    return f16(dd), minus_f16(dd >> 16), bytes_of(s, magic), bytes_of(m, magic)


@triton.jit
def bytes_of(w, magic):
    """The six-bit bytes of `w` in float32."""
    magic = 0x4B000000 + (magic ^ 0x43004300)
    return field(w, magic, 0, 6), field(w, magic, 8, 6), field(w, magic, 16, 6), field(w, magic, 24, 6)


@triton.jit
def q4_k(src, unit, c, magic, ALIGN: tl.constexpr):
    d, minus, scale, minimum = six_bits(src, unit, magic, ALIGN)
    qs = src + 16 + unit * 64 + c * 8
    runs = ()
    for g in tl.static_range(2):
        a, b = words(qs + g * 32, ALIGN)
        runs += pairs(a, magic, 0, 4) + pairs(b, magic, 0, 4) + pairs(a, magic, 4, 4) + pairs(b, magic, 4, 4)
    return runs, (), scale, (d,), minimum, (minus,)


@triton.jit
def q5_k(src, unit, c, magic, ALIGN: tl.constexpr):
    d, minus, scale, minimum = six_bits(src, unit, magic, ALIGN)
    ha, hb = words(src + 16 + c * 8, ALIGN)
    ha = ha >> (unit * 4)
    hb = hb >> (unit * 4)
    qs = src + 48 + unit * 64 + c * 8
    runs = ()
    for g in tl.static_range(2):
        a, b = words(qs + g * 32, ALIGN)
        runs += (
            pairs((a & 0x0F0F0F0F) | ((ha << (4 - 2 * g)) & 0x10101010), magic, 0, 5)
            + pairs((b & 0x0F0F0F0F) | ((hb << (4 - 2 * g)) & 0x10101010), magic, 0, 5)
            + pairs(((a >> 4) & 0x0F0F0F0F) | ((ha << (3 - 2 * g)) & 0x10101010), magic, 0, 5)
            + pairs(((b >> 4) & 0x0F0F0F0F) | ((hb << (3 - 2 * g)) & 0x10101010), magic, 0, 5)
        )
    return runs, (), scale, (d,), minimum, (minus,)


@triton.jit
def sixteenths(unit, c):
    """Unit u is bytes 16 u to 16 u + 15 of ql: by low nibbles one 16 of the elements, by high ones that 64 further."""
    return unit // 4 * 128 + unit % 4 * 16 + c * 4, (0, 64)


@triton.jit
def q6_k(src, unit, c, magic, ALIGN: tl.constexpr):
    d = f16(half(src + 208, ALIGN))
    scale = src + 192 + unit // 4 * 8 + unit % 4
    float_magic = 0x4B000000 + (magic ^ 0x43004300)
    s0 = field(byte(scale), float_magic, 0, 8, MINUS=128, FLIP=128)
    s1 = field(byte(scale + 4), float_magic, 0, 8, MINUS=128, FLIP=128)
    w = word(src + unit * 16 + c * 4, ALIGN)
    high = word(src + 128 + unit // 4 * 32 + unit % 2 * 16 + c * 4, ALIGN) >> (unit // 2 % 2 * 2)
    runs = pairs((w & 0x0F0F0F0F) | ((high << 4) & 0x30303030), magic, 0, 6) + pairs(
        ((w >> 4) & 0x0F0F0F0F) | (high & 0x30303030), magic, 0, 6
    )
    return runs, (), (s0, s1), (d,), (), ()


@triton.jit
def quarters_32(unit, c):
    """Unit u is 16 bytes of qs, and an element of each of the four 32s of a half from each."""
    return unit // 2 * 128 + unit % 2 * 16 + c * 4, (0, 32, 64, 96)


@triton.jit
def q2_k(src, unit, c, magic, ALIGN: tl.constexpr):
    dd = word(src + 80, ALIGN)
    float_magic = 0x4B000000 + (magic ^ 0x43004300)
    sa, sb = words(src + unit // 2 * 8, ALIGN)
    sa = sa >> (unit % 2 * 8)
    sb = sb >> (unit % 2 * 8)
    scale = (
        field(sa, float_magic, 0, 4),
        field(sa, float_magic, 16, 4),
        field(sb, float_magic, 0, 4),
        field(sb, float_magic, 16, 4),
    )
    minimum = (
        field(sa, float_magic, 4, 4),
        field(sa, float_magic, 20, 4),
        field(sb, float_magic, 4, 4),
        field(sb, float_magic, 20, 4),
    )
    w = word(src + 16 + unit * 16 + c * 4, ALIGN)
    runs = pairs(w, magic, 0, 2) + pairs(w, magic, 2, 2) + pairs(w, magic, 4, 2) + pairs(w, magic, 6, 2)
    return runs, (), scale, (f16(dd),), minimum, (minus_f16(dd >> 16),)


@triton.jit
def q3_k(src, unit, c, magic, ALIGN: tl.constexpr):
    h = unit // 2
    j = src + 96 + unit % 2
    d = f16(half(src + 108, ALIGN))
    float_magic = 0x4B000000 + (magic ^ 0x43004300)
    high0 = byte(j + 8) >> (h * 4)
    high1 = byte(j + 10) >> (h * 4)
    scale = (
        field(((byte(j) >> (h * 4)) & 15) | ((high0 & 3) << 4), float_magic, 0, 6, MINUS=32),
        field(((byte(j + 2) >> (h * 4)) & 15) | ((high1 & 3) << 4), float_magic, 0, 6, MINUS=32),
        field(((byte(j + 4) >> (h * 4)) & 15) | ((high0 & 12) << 2), float_magic, 0, 6, MINUS=32),
        field(((byte(j + 6) >> (h * 4)) & 15) | ((high1 & 12) << 2), float_magic, 0, 6, MINUS=32),
    )
    bits = word(src + unit % 2 * 16 + c * 4, ALIGN) >> (h * 4)
    w = word(src + 32 + unit * 16 + c * 4, ALIGN)
    even = (w & 0x33333333) | ((bits << 2) & 0x04040404) | ((bits << 4) & 0x40404040)
    odd = ((w >> 2) & 0x33333333) | ((bits << 1) & 0x04040404) | ((bits << 3) & 0x40404040)
    runs = pairs(even, magic, 0, 3) + pairs(odd, magic, 0, 3) + pairs(even, magic, 4, 3) + pairs(odd, magic, 4, 3)
    return runs, (), scale, (d,), (), ()
