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
lanes of a quarter store 64 or 128 bytes of bf16 next to each other), 16 of each where 8 do (to multiply: each sub-scale
is unpacked for 16 elements).
Layouts: ggml-common.h of llama.cpp. How the pieces work: bits.py.
"""

# ruff: noqa: N803  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

from .bits import byte, f16, field, half, minus_f16, octet, quad, straddling_words, word, words


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
def chunks_64(lane, PER_BLOCK: tl.constexpr):
    """Like `chunks_32`, for lanes with elements in 32s that are 64 apart: neighbours fill whole lines of 128 bytes."""
    h, p, c = quarters(lane, PER_BLOCK)
    at = h * 128 + p * 32 + c * (128 // PER_BLOCK)
    if PER_BLOCK == 16:
        offsets = (0, 64)
    else:
        offsets = (0, 8, 64, 72)
    return at, offsets, ()


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
    if PER_BLOCK == 16 and ALIGN % 4 != 0:  # fewer loads, more arithmetic: to dequantise has some to spare
        w = straddling_words(ptr)
    elif PER_BLOCK == 16:
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
    h, p, c = quarters(lane, PER_BLOCK)
    d = f16(half(src + 108, ALIGN))
    # Low four bits of sub-scale 8h + j: nibble h of byte j. High two: bits 2 (2h + j / 4) of byte 8 + j % 4.
    j = p * 2 + c * (128 // PER_BLOCK) // 16
    high = byte(src + 104 + j) >> (h * 4)
    s0 = ((byte(src + 96 + j) >> (h * 4)) & 15) | ((high & 3) << 4)
    s1 = ((byte(src + 100 + j) >> (h * 4)) & 15) | ((high & 12) << 2)
    q0, q1 = (), ()
    for i in tl.static_range(16 // PER_BLOCK):
        at = c * (128 // PER_BLOCK) + i * 8
        ha, hb = words(src + at, ALIGN)
        a, b = words(src + 32 + h * 32 + at, ALIGN)
        a = (a >> (2 * p)) & 0x33333333
        b = (b >> (2 * p)) & 0x33333333
        ha = ha >> (h * 4 + p)
        hb = hb >> (h * 4 + p)
        a = a | ((ha << 2) & 0x04040404) | ((ha << 4) & 0x40404040)
        b = b | ((hb << 2) & 0x04040404) | ((hb << 4) & 0x40404040)
        q0 += (octet(a, b, magic, 0, 3, MINUS=4),)
        q1 += (octet(a, b, magic, 4, 3, MINUS=4),)
    scales = doubled(field(s0, magic, 0, 6, MINUS=32), field(s1, magic, 0, 6, MINUS=32), PER_BLOCK)
    return q0 + q1, scales, (d,), (), ()


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
def q6_k(src, lane, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    h, p, c = quarters(lane, PER_BLOCK)
    d = f16(half(src + 208, ALIGN))
    at = c * (128 // PER_BLOCK)
    scale = src + 192 + h * 8 + p * 2 + at // 16
    s0 = field(byte(scale), magic, 0, 8, MINUS=128, FLIP=128)
    s1 = field(byte(scale + 4), magic, 0, 8, MINUS=128, FLIP=128)
    high = run(src + 128 + h * 32 + at, PER_BLOCK, ALIGN)
    low = run(src + h * 64 + p * 32 + at, PER_BLOCK, ALIGN)
    q0, q1 = (), ()
    for i in tl.static_range(16 // PER_BLOCK):
        a, b = low[2 * i], low[2 * i + 1]
        ha = high[2 * i] >> (2 * p)
        hb = high[2 * i + 1] >> (2 * p)
        low_a = (a & 0x0F0F0F0F) | ((ha << 4) & 0x30303030)
        low_b = (b & 0x0F0F0F0F) | ((hb << 4) & 0x30303030)
        q0 += (octet(low_a, low_b, magic, 0, 6, MINUS=32),)
        high_a = ((a >> 4) & 0x0F0F0F0F) | (ha & 0x30303030)
        high_b = ((b >> 4) & 0x0F0F0F0F) | (hb & 0x30303030)
        q1 += (octet(high_a, high_b, magic, 0, 6, MINUS=32),)
    return q0 + q1, doubled(s0, s1, PER_BLOCK), (d,), (), ()
