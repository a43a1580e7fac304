"""The K-quants: superblocks of 256 elements with quantised sub-scales.

Element 128 h + 32 k + i (h = 0, 1; k = 0..3; i = 0..31) unless said otherwise; its sub-scale is the one at
8 h + 2 k + i / 16.

    Q2_K  sc:16 (4 bits scale, 4 bits min)  qs:64  d dmin:f16    bits 2k of qs[32 h + i]
                                                                 y = (d sc) q - (dmin m)
    Q3_K  hmask:32  qs:64  sc:12 (16 x 6 bits)  d:f16            bits 2k of qs[32 h + i], bit 4h + k of hmask[i]
                                                                 y = (d (sc - 32)) (q - 4)
    Q4_K  d dmin:f16  sc:12 (8 x 6 + 6 bits)  qs:128             element 64 g + 32 n + i: nibble n of qs[32 g + i],
    Q5_K  d dmin:f16  sc:12  qh:32  qs:128                       sub-scale 2 g + n; bit 2g + n of qh[i]
                                                                 y = (d sc) q - (dmin m)
    Q6_K  ql:128  qh:64  sc:16 x i8  d:f16                       nibble k / 2 of ql[64 h + 32 (k % 2) + i],
                                                                 bits 2k of qh[32 h + i];  y = (d sc) (q - 32)

A lane makes elements of two of the eight 32s of a superblock, 8 of each where 16 lanes share it (to dequantise: the
lanes of a quarter store 64 bytes of bf16 next to each other), 16 of each where 8 do (to multiply: each sub-scale is
unpacked for 16 elements). In Q3_K and Q6_K, whose bytes cost more loads, it makes 8 of each of the four 32s of a half,
so that all bits that it loads are its own.
Layouts: ggml-common.h of llama.cpp. How the pieces work: bits.py.
"""

# ruff: noqa: N803  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

from .bits import byte, f16, field, half, minus_f16, octet, quad, word, words


@triton.jit
def quarters(lane, PER_BLOCK: tl.constexpr):
    """Half h, pair p of 32s in it, and the run c of a lane in each of the two 32s."""
    return lane // (PER_BLOCK // 2), lane // (PER_BLOCK // 4) % 2, lane % (PER_BLOCK // 4)


@triton.jit
def chunks_32(lane, PER_BLOCK: tl.constexpr):
    """Like `chunks_16`, for lanes with 8 (PER_BLOCK = 16) or 16 (8) elements in each of two neighbouring 32s."""
    h, p, c = quarters(lane, PER_BLOCK)
    at = h * 128 + p * 64 + c * (128 // PER_BLOCK)
    if PER_BLOCK == 16:
        offsets = (0, 32)
    else:
        offsets = (0, 8, 32, 40)
    return at, offsets, ()


@triton.jit
def chunks_8(lane, PER_BLOCK: tl.constexpr):
    """Like `chunks_32`, for lanes with 8 elements in each 32 of a half."""
    return lane // 4 * 128 + lane % 4 * 8, (0, 32, 64, 96), ()


@triton.jit
def doubled(first, second, PER_BLOCK: tl.constexpr):
    """A number for each chunk, from one for each of the two 32s."""
    if PER_BLOCK == 16:
        each = (first, second)
    else:
        each = (first, first, second, second)
    return each


@triton.jit
def run(ptr, PER_BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """The words of a lane's run of bytes: two for 8 (PER_BLOCK = 16) or four for 16 (8)."""
    if PER_BLOCK == 16:
        w = words(ptr, ALIGN)
    else:
        w = quad(ptr, ALIGN)
    return w


@triton.jit
def q2_k(src, lane, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    h, p, c = quarters(lane, PER_BLOCK)
    dd = word(src + 80, ALIGN)
    s = word(src + h * 8 + p * 4, ALIGN) >> (c * (128 // PER_BLOCK) // 16 * 8)  # elements 16-31 have the odd ones
    scales = doubled(field(s, magic, 0, 4), field(s, magic, 16, 4), PER_BLOCK)
    mins = doubled(field(s, magic, 4, 4), field(s, magic, 20, 4), PER_BLOCK)
    q0, q1 = (), ()
    for i in tl.static_range(16 // PER_BLOCK):
        a, b = words(src + 16 + h * 32 + c * (128 // PER_BLOCK) + i * 8, ALIGN)
        a = a >> (4 * p)
        b = b >> (4 * p)
        q0 += (octet(a, b, magic, 0, 2),)
        q1 += (octet(a, b, magic, 2, 2),)
    return q0 + q1, scales, (f16(dd),), mins, (minus_f16(dd >> 16),)


@triton.jit
def q3_k(src, lane, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    h = lane // 4
    c = lane % 4
    d = f16(half(src + 108, ALIGN))
    # Low four bits of sub-scale 8h + j: nibble h of byte j. High two: bits 2 (2h + j / 4) of byte 8 + j % 4.
    sc = src + 96 + c // 2
    high0 = byte(sc + 8) >> (h * 4)
    high1 = byte(sc + 10) >> (h * 4)
    s0 = ((byte(sc) >> (h * 4)) & 15) | ((high0 & 3) << 4)
    s1 = ((byte(sc + 2) >> (h * 4)) & 15) | ((high1 & 3) << 4)
    s2 = ((byte(sc + 4) >> (h * 4)) & 15) | ((high0 & 12) << 2)
    s3 = ((byte(sc + 6) >> (h * 4)) & 15) | ((high1 & 12) << 2)
    ha, hb = words(src + c * 8, ALIGN)
    a, b = words(src + 32 + h * 32 + c * 8, ALIGN)
    ha = ha >> (h * 4)
    hb = hb >> (h * 4)
    # In every byte: the three bits of k = 0 and of k = 2, and those of k = 1 and of k = 3.
    a02 = (a & 0x33333333) | ((ha << 2) & 0x04040404) | ((ha << 4) & 0x40404040)
    b02 = (b & 0x33333333) | ((hb << 2) & 0x04040404) | ((hb << 4) & 0x40404040)
    a13 = ((a >> 2) & 0x33333333) | ((ha << 1) & 0x04040404) | ((ha << 3) & 0x40404040)
    b13 = ((b >> 2) & 0x33333333) | ((hb << 1) & 0x04040404) | ((hb << 3) & 0x40404040)
    quants = (
        octet(a02, b02, magic, 0, 3, MINUS=4),
        octet(a13, b13, magic, 0, 3, MINUS=4),
        octet(a02, b02, magic, 4, 3, MINUS=4),
        octet(a13, b13, magic, 4, 3, MINUS=4),
    )
    scales = (
        field(s0, magic, 0, 6, MINUS=32),
        field(s1, magic, 0, 6, MINUS=32),
        field(s2, magic, 0, 6, MINUS=32),
        field(s3, magic, 0, 6, MINUS=32),
    )
    return quants, scales, (d,), (), ()


@triton.jit
def scales_and_mins(s0, s1, s2, h, p, magic):
    """The 6-bit scales and mins of sub-blocks 4 h + 2 p and 4 h + 2 p + 1, of the eight in three words.

    By bytes, s0 = EEAAAAAA, s1 = eeaaaaaa, s2 = eeeeEEEE: A, a are scale and min of sub-block 0, E, e of sub-block 4.
    """
    s0 = s0 >> (16 * p)
    s1 = s1 >> (16 * p)
    s2 = s2 >> (16 * p)
    s = tl.where(h == 1, (s2 & 0x0F0F) | ((s0 >> 2) & 0x3030), s0 & 0x3F3F)
    m = tl.where(h == 1, ((s2 >> 4) & 0x0F0F) | ((s1 >> 2) & 0x3030), s1 & 0x3F3F)
    return field(s, magic, 0, 6), field(s, magic, 8, 6), field(m, magic, 0, 6), field(m, magic, 8, 6)


@triton.jit
def q4_k(src, lane, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    h, p, c = quarters(lane, PER_BLOCK)
    dd, w0, w1, w2 = quad(src, ALIGN)
    s0, s1, m0, m1 = scales_and_mins(w0, w1, w2, h, p, magic)
    w = run(src + 16 + h * 64 + p * 32 + c * (128 // PER_BLOCK), PER_BLOCK, ALIGN)
    q0, q1 = (), ()
    for i in tl.static_range(16 // PER_BLOCK):
        q0 += (octet(w[2 * i], w[2 * i + 1], magic, 0, 4),)
        q1 += (octet(w[2 * i], w[2 * i + 1], magic, 4, 4),)
    scales = doubled(s0, s1, PER_BLOCK)
    return q0 + q1, scales, (f16(dd),), doubled(m0, m1, PER_BLOCK), (minus_f16(dd >> 16),)


@triton.jit
def q5_k(src, lane, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    h, p, c = quarters(lane, PER_BLOCK)
    dd, w0, w1, w2 = quad(src, ALIGN)
    s0, s1, m0, m1 = scales_and_mins(w0, w1, w2, h, p, magic)
    at = c * (128 // PER_BLOCK)
    high = run(src + 16 + at, PER_BLOCK, ALIGN)
    low = run(src + 48 + h * 64 + p * 32 + at, PER_BLOCK, ALIGN)
    q0, q1 = (), ()
    for i in tl.static_range(16 // PER_BLOCK):
        a, b = low[2 * i], low[2 * i + 1]
        ha = high[2 * i] >> (h * 4 + p * 2)
        hb = high[2 * i + 1] >> (h * 4 + p * 2)
        low_a = (a & 0x0F0F0F0F) | ((ha << 4) & 0x10101010)
        low_b = (b & 0x0F0F0F0F) | ((hb << 4) & 0x10101010)
        q0 += (octet(low_a, low_b, magic, 0, 5),)
        high_a = ((a >> 4) & 0x0F0F0F0F) | ((ha << 3) & 0x10101010)
        high_b = ((b >> 4) & 0x0F0F0F0F) | ((hb << 3) & 0x10101010)
        q1 += (octet(high_a, high_b, magic, 0, 5),)
    scales = doubled(s0, s1, PER_BLOCK)
    return q0 + q1, scales, (f16(dd),), doubled(m0, m1, PER_BLOCK), (minus_f16(dd >> 16),)


@triton.jit
def six_bits(low, high, magic, N: tl.constexpr, UP: tl.constexpr):
    """Nibbles N of the eight bytes of the words `low`, with bits UP and UP + 1 of those of `high` above them."""
    a, b = low
    ha, hb = high
    if UP < 4:
        ha = ha << (4 - UP)
        hb = hb << (4 - UP)
    elif UP > 4:
        ha = ha >> (UP - 4)
        hb = hb >> (UP - 4)
    qa = ((a >> (4 * N)) & 0x0F0F0F0F) | (ha & 0x30303030)
    qb = ((b >> (4 * N)) & 0x0F0F0F0F) | (hb & 0x30303030)
    return octet(qa, qb, magic, 0, 6, MINUS=32)


@triton.jit
def signed_byte(ptr, magic):
    return field(byte(ptr), magic, 0, 8, MINUS=128, FLIP=128)


@triton.jit
def q6_k(src, lane, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    h = lane // 4
    c = lane % 4
    d = f16(half(src + 208, ALIGN))
    sc = src + 192 + h * 8 + c // 2
    scales = (
        signed_byte(sc, magic),
        signed_byte(sc + 2, magic),
        signed_byte(sc + 4, magic),
        signed_byte(sc + 6, magic),
    )
    high = words(src + 128 + h * 32 + c * 8, ALIGN)
    even = words(src + h * 64 + c * 8, ALIGN)
    odd = words(src + h * 64 + 32 + c * 8, ALIGN)
    quants = (
        six_bits(even, high, magic, 0, 0),
        six_bits(odd, high, magic, 0, 2),
        six_bits(even, high, magic, 1, 4),
        six_bits(odd, high, magic, 1, 6),
    )
    return quants, scales, (d,), (), ()
