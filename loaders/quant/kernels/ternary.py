"""The ternary types: 256 elements of -1, 0, 1 and one scale.

    TQ2_0  qs:64  d:f16          element 128 h + 32 k + i: bits 2k of qs[32 h + i]
    TQ1_0  qs:48  qh:4  d:f16    a byte is a fraction in base 3, x / 256 = 0.t0 t1 t2 t3 t4: digit n is the integer part
                                 of 3 ((3^n x mod 256) / 256)
           element 32 n + i: digit n of qs[i];  160 + 16 n + i: digit n of qs[32 + i];  240 + 4 n + i: digit n of qh[i]
    both   y = d (t - 1)

Layouts: ggml-common.h and ggml-quants.c of llama.cpp. How the pieces work: bits.py.
"""

# ruff: noqa: N803  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

from .bits import f16, field, half, join8, octet, word, words
from .kquants import quarters


@triton.jit
def tq2_0(src, lane, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    h, p, c = quarters(lane, PER_BLOCK)
    d = f16(half(src + 64, ALIGN))
    q0, q1 = (), ()
    for i in tl.static_range(16 // PER_BLOCK):
        a, b = words(src + h * 32 + c * (128 // PER_BLOCK) + i * 8, ALIGN)
        q0 += (octet(a >> (4 * p), b >> (4 * p), magic, 0, 2, MINUS=1),)
        q1 += (octet(a >> (4 * p), b >> (4 * p), magic, 2, 2, MINUS=1),)
    return q0 + q1, (), (d,), (), ()


@triton.jit
def digits(lane, PER_BLOCK: tl.constexpr):
    """Lanes 0-5 take 8 bytes of qs and make five chunks, one for each digit. Lanes 6 and 7 take the four bytes of qh,
    two digits each, and make one chunk: the others are not theirs."""
    tail = lane >= 6
    at = tl.where(lane < 4, lane * 8, 128 + lane * 8 + tl.where(tail, 64, 0))
    step = tl.where(lane < 4, 32, 16)
    return at, (0, step, 2 * step, 3 * step, 4 * step), (lane < 6,)


@triton.jit
def tq1_0(src, lane, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    d = f16(half(src + 52, ALIGN))
    tail = lane >= 6
    a = word(src + tl.where(tail, 48, lane * 8), ALIGN)
    b = word(src + tl.where(tail, 48, lane * 8 + 4), ALIGN)
    # Where a lane's first digit is not digit 0: lane 6 takes digits 0 (a) and 1 (b), lane 7 digits 2 and 3.
    skip_a = tl.where(lane == 7, 9, 1)
    skip_b = tl.where(tail, skip_a * 3, 1)
    # Bytes 0, 2 and bytes 1, 3 of a word, 16 bits apart, so that three times a byte has room.
    a0 = ((a & 0x00FF00FF) * skip_a) & 0x00FF00FF
    a1 = (((a >> 8) & 0x00FF00FF) * skip_a) & 0x00FF00FF
    b0 = ((b & 0x00FF00FF) * skip_b) & 0x00FF00FF
    b1 = (((b >> 8) & 0x00FF00FF) * skip_b) & 0x00FF00FF
    qs = ()
    for _ in tl.static_range(5):
        a0 = a0 * 3
        a1 = a1 * 3
        b0 = b0 * 3
        b1 = b1 * 3
        qs += (
            join8(
                field(a0, magic, 8, 2, MINUS=1),
                field(a1, magic, 8, 2, MINUS=1),
                field(a0, magic, 24, 2, MINUS=1),
                field(a1, magic, 24, 2, MINUS=1),
                field(b0, magic, 8, 2, MINUS=1),
                field(b1, magic, 8, 2, MINUS=1),
                field(b0, magic, 24, 2, MINUS=1),
                field(b1, magic, 24, 2, MINUS=1),
            ),
        )
        a0 = a0 & 0x00FF00FF
        a1 = a1 & 0x00FF00FF
        b0 = b0 & 0x00FF00FF
        b1 = b1 & 0x00FF00FF
    return qs, (), (d,), (), ()
