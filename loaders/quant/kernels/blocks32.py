"""The small-block types: one scale for 32 elements (NVFP4: for 16), nibbles or bytes behind it.

    Q4_0    d:f16               qs:16           y = d (q - 8)
    Q4_1    d:f16 m:f16         qs:16           y = d q + m
    Q5_0    d:f16        qh:32b qs:16           y = d (q - 16)
    Q5_1    d:f16 m:f16  qh:32b qs:16           y = d q + m
    Q8_0    d:f16               qs:32 x i8      y = d q
    IQ4_NL  d:f16               qs:16           y = d table[q]
    MXFP4   e:u8                qs:16           y = 2^(e - 128) q, q a doubled e2m1
    NVFP4   d:4 x ue4m3         qs:32           y = d[s] / 2 q,    q a doubled e2m1, 64 elements

Of every 16 bytes of qs the low nibbles are elements 0-15 and the high nibbles elements 16-31 (NVFP4: of every 8 bytes,
elements 0-7 and 8-15). qh holds the fifth bit of element i in bit i. Two lanes share a block: each reads 8 of the 16
bytes and writes two chunks of 8 elements. Layouts: ggml-common.h of llama.cpp. How the pieces work: bits.py.
"""

# ruff: noqa: N803  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

from .bits import byte, e2m1_octet, f16, half, lookup8, octet, word, words


@triton.jit
def q4_0(src, c, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    d = f16(half(src, ALIGN))
    a, b = words(src + 2 + c * 8, ALIGN)
    return (octet(a, b, magic, 0, 4, MINUS=8), octet(a, b, magic, 4, 4, MINUS=8)), (), (d,), (), ()


@triton.jit
def q4_1(src, c, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    dm = word(src, ALIGN)
    d = f16(dm)
    m = f16(dm >> 16)
    a, b = words(src + 4 + c * 8, ALIGN)
    return (octet(a, b, magic, 0, 4), octet(a, b, magic, 4, 4)), (), (d,), (), (m,)


@triton.jit
def five_bits(a, b, high, magic, N: tl.constexpr, MINUS: tl.constexpr):
    """Nibbles N of the eight bytes of a, b with the bits of byte 2 N of `high` as their fifth: [LANES, 8] float32.

    The multiplication puts four bits into bit 4 of the four bytes of a word; their copies do not meet.
    """
    high_a = (((high >> (16 * N)) & 15) * 0x02040810) & 0x10101010
    high_b = (((high >> (16 * N + 4)) & 15) * 0x02040810) & 0x10101010
    qa = ((a >> (4 * N)) & 0x0F0F0F0F) | high_a
    qb = ((b >> (4 * N)) & 0x0F0F0F0F) | high_b
    return octet(qa, qb, magic, 0, 5, MINUS)


@triton.jit
def q5_0(src, c, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    d = f16(half(src, ALIGN))
    high = word(src + 2, ALIGN) >> (c * 8)
    a, b = words(src + 6 + c * 8, ALIGN)
    return (five_bits(a, b, high, magic, 0, 16), five_bits(a, b, high, magic, 1, 16)), (), (d,), (), ()


@triton.jit
def q5_1(src, c, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    dm = word(src, ALIGN)
    d = f16(dm)
    m = f16(dm >> 16)
    high = word(src + 4, ALIGN) >> (c * 8)
    a, b = words(src + 8 + c * 8, ALIGN)
    return (five_bits(a, b, high, magic, 0, 0), five_bits(a, b, high, magic, 1, 0)), (), (d,), (), (m,)


@triton.jit
def q8_0(src, c, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    d = f16(half(src, ALIGN))
    qs = src + 2 + c * 8
    a0, b0 = words(qs, ALIGN)
    a1, b1 = words(qs + 16, ALIGN)
    return (
        (octet(a0, b0, magic, 0, 8, MINUS=128, FLIP=128), octet(a1, b1, magic, 0, 8, MINUS=128, FLIP=128)),
        (),
        (d,),
        (),
        (),
    )


@triton.jit
def iq4_nl(src, c, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    d = f16(half(src, ALIGN))
    a, b = words(src + 2 + c * 8, ALIGN)
    low = lookup8(table, a, b, 0)
    high = lookup8(table, a, b, 4)
    return (low, high), (), (d,), (), ()


@triton.jit
def mxfp4(src, c, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    e = byte(src)
    # half of the power of two that e stands for, because q comes doubled; e < 2 is subnormal
    d = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)
    a, b = words(src + 1 + c * 8, ALIGN)
    return (e2m1_octet(a, b, 0), e2m1_octet(a, b, 1)), (), (d,), (), ()


@triton.jit
def ue4m3_half(scale):
    """Half of the ue4m3 number in the low byte, float32: a float16 of the same bits is 2^-7 times that.

    0x7F is zero by definition, 0xFF is not; other signs are ignored.
    """
    return tl.where((scale & 0xFF) == 0x7F, 0.0, f16((scale & 0x7F) << 7) * 128.0)


@triton.jit
def nvfp4_chunks(lane, PER_BLOCK: tl.constexpr):
    """Lane 2 s + n takes the low (n = 0) or high nibbles behind scales s and s + 2, so that two neighbours fill a
    32-byte sector with each store."""
    return lane * 8, (0, 32), ()


@triton.jit
def nvfp4(src, lane, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    s = lane // 2
    down = lane % 2 * 4
    scales = word(src, ALIGN) >> (s * 8)
    qs = src + 4 + s * 8
    a0, b0 = words(qs, ALIGN)
    a1, b1 = words(qs + 16, ALIGN)
    return (
        (e2m1_octet(a0 >> down, b0 >> down, 0), e2m1_octet(a1 >> down, b1 >> down, 0)),
        (ue4m3_half(scales), ue4m3_half(scales >> 16)),
        (),
        (),
        (),
    )
