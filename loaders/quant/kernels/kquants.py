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

Eight lanes share a superblock: lane 4 h + c reads the 8 bytes at i = 8 c of half h and writes four chunks of 8
elements; the four lanes of a half write 64 bytes of bf16 next to each other. Sub-scales are unpacked by the word.
Layouts: ggml-common.h of llama.cpp. How the pieces work: bits.py.
"""

# ruff: noqa: N803  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

from .bits import f16, field, half, octet, place, store, word, words


@triton.jit(do_not_specialize=["n_blocks"])
def q2_k(src, out, n_blocks, ALIGN: tl.constexpr, LANES: tl.constexpr):
    src, out, lane, magic = place(src, out, n_blocks, 84, 256, 8, LANES)
    c = lane % 4
    h = lane // 4
    dd = word(src + 80, ALIGN)
    d = f16(dd)
    dmin = f16(dd >> 16)
    s01, s23 = words(src + h * 8, ALIGN)
    upper = c // 2 * 8  # elements 16-31 of a 32 have the odd sub-scales
    a, b = words(src + 16 + h * 32 + c * 8, ALIGN)
    out += h * 128 + c * 8
    for k in tl.static_range(4):
        s = (s01 if k < 2 else s23) >> upper
        dl = d * field(s, magic, 16 * (k % 2), 4)
        ml = dmin * field(s, magic, 16 * (k % 2) + 4, 4)
        store(out + 32 * k, octet(a, b, magic, 2 * k, 2) * dl[:, None] - ml[:, None])


@triton.jit(do_not_specialize=["n_blocks"])
def q3_k(src, out, n_blocks, ALIGN: tl.constexpr, LANES: tl.constexpr):
    src, out, lane, magic = place(src, out, n_blocks, 110, 256, 8, LANES)
    c = lane % 4
    h = lane // 4
    d = f16(half(src + 108, ALIGN))
    # Low four bits of sub-scale 8h + j: nibble h of byte j. High two: bits 2 (2h + j / 4) of byte 8 + j % 4.
    down = c // 2 * 8 + h * 4
    low01, low23 = words(src + 96, ALIGN)
    high = word(src + 104, ALIGN) >> down
    sc01 = ((low01 >> down) & 0x000F000F) | ((high << 4) & 0x00300030)
    sc23 = ((low23 >> down) & 0x000F000F) | ((high << 2) & 0x00300030)
    ha, hb = words(src + c * 8, ALIGN)
    ha = ha >> (h * 4)
    hb = hb >> (h * 4)
    a, b = words(src + 32 + h * 32 + c * 8, ALIGN)
    out += h * 128 + c * 8
    for k in tl.static_range(4):
        dl = d * field(sc01 if k < 2 else sc23, magic, 16 * (k % 2), 6, MINUS=32)
        qa = ((a >> (2 * k)) & 0x03030303) | (((ha << 2) >> k) & 0x04040404)
        qb = ((b >> (2 * k)) & 0x03030303) | (((hb << 2) >> k) & 0x04040404)
        store(out + 32 * k, octet(qa, qb, magic, 0, 3, MINUS=4) * dl[:, None])


@triton.jit
def scales_and_mins(src, upper, ALIGN: tl.constexpr):
    """Four of the eight 6-bit scales and mins at `src`, one to a byte: sub-blocks 4-7 where `upper`, else 0-3.

    s0 = EEAAAAAA..., s1 = eeaaaaaa..., s2 = eeeeEEEE...: A, a are scale and min of sub-block 0, E, e of sub-block 4.
    """
    s0 = word(src, ALIGN)
    s1 = word(src + 4, ALIGN)
    s2 = word(src + 8, ALIGN)
    scales = tl.where(upper, (s2 & 0x0F0F0F0F) | ((s0 >> 2) & 0x30303030), s0 & 0x3F3F3F3F)
    mins = tl.where(upper, ((s2 >> 4) & 0x0F0F0F0F) | ((s1 >> 2) & 0x30303030), s1 & 0x3F3F3F3F)
    return scales, mins


@triton.jit(do_not_specialize=["n_blocks"])
def q4_k(src, out, n_blocks, ALIGN: tl.constexpr, LANES: tl.constexpr):
    src, out, lane, magic = place(src, out, n_blocks, 144, 256, 8, LANES)
    c = lane % 4
    h = lane // 4
    dd = word(src, ALIGN)
    d = f16(dd)
    dmin = f16(dd >> 16)
    scales, mins = scales_and_mins(src + 4, h == 1, ALIGN)
    qs = src + 16 + h * 64 + c * 8
    a0, b0 = words(qs, ALIGN)
    a1, b1 = words(qs + 32, ALIGN)
    out += h * 128 + c * 8
    for k in tl.static_range(4):
        dl = d * field(scales, magic, 8 * k, 6)
        ml = dmin * field(mins, magic, 8 * k, 6)
        q = octet(a0 if k < 2 else a1, b0 if k < 2 else b1, magic, 4 * (k % 2), 4)
        store(out + 32 * k, q * dl[:, None] - ml[:, None])


@triton.jit(do_not_specialize=["n_blocks"])
def q5_k(src, out, n_blocks, ALIGN: tl.constexpr, LANES: tl.constexpr):
    src, out, lane, magic = place(src, out, n_blocks, 176, 256, 8, LANES)
    c = lane % 4
    h = lane // 4
    dd = word(src, ALIGN)
    d = f16(dd)
    dmin = f16(dd >> 16)
    scales, mins = scales_and_mins(src + 4, h == 1, ALIGN)
    ha, hb = words(src + 16 + c * 8, ALIGN)
    ha = ha >> (h * 4)
    hb = hb >> (h * 4)
    qs = src + 48 + h * 64 + c * 8
    a0, b0 = words(qs, ALIGN)
    a1, b1 = words(qs + 32, ALIGN)
    out += h * 128 + c * 8
    for k in tl.static_range(4):
        dl = d * field(scales, magic, 8 * k, 6)
        ml = dmin * field(mins, magic, 8 * k, 6)
        qa = (((a0 if k < 2 else a1) >> (4 * (k % 2))) & 0x0F0F0F0F) | ((ha << (4 - k)) & 0x10101010)
        qb = (((b0 if k < 2 else b1) >> (4 * (k % 2))) & 0x0F0F0F0F) | ((hb << (4 - k)) & 0x10101010)
        store(out + 32 * k, octet(qa, qb, magic, 0, 5) * dl[:, None] - ml[:, None])


@triton.jit
def six_bits(low, high, K: tl.constexpr):
    """Nibbles K / 2 of the four bytes of `low`, under bits 2 K, 2 K + 1 of the bytes of `high`."""
    if K < 2:
        top = high << (4 - 2 * K)
    else:
        top = high >> (2 * K - 4)
    return ((low >> (K // 2 * 4)) & 0x0F0F0F0F) | (top & 0x30303030)


@triton.jit(do_not_specialize=["n_blocks"])
def q6_k(src, out, n_blocks, ALIGN: tl.constexpr, LANES: tl.constexpr):
    src, out, lane, magic = place(src, out, n_blocks, 210, 256, 8, LANES)
    c = lane % 4
    h = lane // 4
    d = f16(half(src + 208, ALIGN))
    s01, s23 = words(src + 192 + h * 8, ALIGN)
    upper = c // 2 * 8  # elements 16-31 of a 32 have the odd sub-scales
    ha, hb = words(src + 128 + h * 32 + c * 8, ALIGN)
    ql = src + h * 64 + c * 8
    a0, b0 = words(ql, ALIGN)
    a1, b1 = words(ql + 32, ALIGN)
    out += h * 128 + c * 8
    for k in tl.static_range(4):
        dl = d * field((s01 if k < 2 else s23) >> upper, magic, 16 * (k % 2), 8, MINUS=128, FLIP=128)
        qa = six_bits(a1 if k % 2 else a0, ha, k)
        qb = six_bits(b1 if k % 2 else b0, hb, k)
        store(out + 32 * k, octet(qa, qb, magic, 0, 6, MINUS=32) * dl[:, None])
