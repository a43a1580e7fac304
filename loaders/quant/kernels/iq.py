"""The i-quants: superblocks of 256 elements whose quants are rows of a fixed grid.

t = 0..31 counts the chunks of 8 elements of a superblock, s = t / 4 its sub-blocks of 32, u = t % 4.

    IQ2_XXS  d  8 x (idx:4 x u8, aux:u32)      row idx[t];  signs 7 bits at 7 u of aux, scale its top 4
    IQ2_XS   d  qs:32 x u16  sc:8              row qs[t] & 511, signs qs[t] >> 9;  sc nibble t / 2
    IQ2_S    d  qs:32  signs:32  qh:8  sc:8    row qs[t] | 2 bits of qh[s];  sc nibble t / 2
    IQ3_XXS  d  qs:64  8 x aux:u32             rows of 4: qs[2t], qs[2t + 1];  signs and scale as IQ2_XXS
    IQ3_S    d  qs:64  qh:8  signs:32  sc:4    rows of 4: qs[2t], qs[2t + 1], each | 1 bit of qh[s];  sc nibble s
    IQ1_S    d  qs:32  qh:8 x u16              row qs[t] | 3 bits of qh[s];  scale and shift are the top 4 of qh[s]
    IQ1_M    qs:32  qh:16  sc:4 x u16          row qs[t] | 3 bits of qh[t / 2], shift the 4th;  3 bits of sc for every
                                               16 elements, d in the top nibbles of the four sc
    IQ4_XS   d  sc_h:u16  sc_l:4  qs:128       nibbles of qs[16 s + ...] as in IQ4_NL;  4 bits of sc_l, 2 of sc_h

             y = d (2 sc + 1) / 8 * grid * sign       IQ2 (IQ3_XXS: / 4;  IQ3_S: / 1)
             y = d (2 sc + 1) * (grid +- 1/8)         IQ1
             y = d (sc - 32) * table[q]               IQ4_XS

A seven-bit sign field leaves out the eighth sign: the number of minus signs is even. Sixteen lanes share a superblock:
lane 2 s + c makes the chunks u = c and c + 2 of sub-block s, so that two lanes fill a 32-byte sector with each store.
Grids are prepared by grids.py: IQ2 and IQ3 hold a byte for each element, 64 too large, IQ1 a nibble.
Layouts: ggml-common.h and ggml-quants.c of llama.cpp. How the pieces work: bits.py.
"""

# ruff: noqa: N803  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

from .bits import byte, f16, field, half, join8, lookup8, octet, word, words


@triton.jit
def even_signs(bits):
    """Seven sign bits with the eighth that makes their number even. Bits beyond the eighth are zero.

    Bit n of 0x6996 is the parity of n = 0..15.
    """
    bits = bits & 127
    return bits | (((0x6996 << 7) >> ((bits ^ (bits >> 4)) & 15)) & 128)


@triton.jit
def negate(w, signs):
    """Four bytes 64 + m, made 64 - m in seven bits where the low four bits of `signs` say so.

    64 - m = ~(64 + m) + 1 modulo 128, and neither step carries into the next byte.
    """
    s = ((signs & 15) * 0x00204081) & 0x01010101
    return (w ^ (s * 255)) + s


@triton.jit
def signed8(a, b, magic, signs):
    """The eight grid bytes of the words a, b with their signs: [LANES, 8] float32."""
    return octet(negate(a, signs), negate(b, signs >> 4), magic, 0, 7, MINUS=64)


@triton.jit
def row8(grid, index):
    """Row `index` of a grid of 8-byte rows, as two words."""
    return tl.split(tl.load((grid + index * 2)[:, None] + tl.arange(0, 2)[None, :]))


@triton.jit
def iq2_xxs(src, lane, magic, grid, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    c = lane % 2
    sub = src + 2 + lane // 2 * 8
    aux = word(sub + 4, ALIGN)
    a0, b0 = row8(grid, byte(sub + c))
    a1, b1 = row8(grid, byte(sub + c + 2))
    d = f16(half(src, ALIGN)) * field(aux, magic, 28, 4, MINUS=-0.5) * 0.25
    signs = aux >> (c * 7)
    return (
        (signed8(a0, b0, magic, even_signs(signs)), signed8(a1, b1, magic, even_signs(signs >> 14))),
        (),
        (d,),
        (),
        (),
    )


@triton.jit
def iq2_xs(src, lane, magic, grid, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    s = lane // 2
    qs = src + 2 + s * 8 + lane % 2 * 2
    q0 = half(qs, ALIGN)
    q1 = half(qs + 4, ALIGN)
    a0, b0 = row8(grid, q0 & 511)
    a1, b1 = row8(grid, q1 & 511)
    scales = byte(src + 66 + s)
    d = f16(half(src, ALIGN)) * 0.25
    scale0 = field(scales, magic, 0, 4, MINUS=-0.5)
    scale1 = field(scales, magic, 4, 4, MINUS=-0.5)
    return (
        (signed8(a0, b0, magic, even_signs(q0 >> 9)), signed8(a1, b1, magic, even_signs(q1 >> 9))),
        (scale0, scale1),
        (d,),
        (),
        (),
    )


@triton.jit
def iq2_s(src, lane, magic, grid, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    s = lane // 2
    c = lane % 2
    qs = src + 2 + s * 4 + c
    high = (byte(src + 66 + s) << 8) >> (c * 2)
    a0, b0 = row8(grid, byte(qs) | (high & 0x300))
    a1, b1 = row8(grid, byte(qs + 2) | ((high >> 4) & 0x300))
    signs0 = byte(qs + 32)
    signs1 = byte(qs + 34)
    scales = byte(src + 74 + s)
    d = f16(half(src, ALIGN)) * 0.25
    scale0 = field(scales, magic, 0, 4, MINUS=-0.5)
    scale1 = field(scales, magic, 4, 4, MINUS=-0.5)
    return (signed8(a0, b0, magic, signs0), signed8(a1, b1, magic, signs1)), (scale0, scale1), (d,), (), ()


@triton.jit
def iq3_xxs(src, lane, magic, grid, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    s = lane // 2
    c = lane % 2
    qs = src + 2 + s * 8 + c * 2
    q0 = half(qs, ALIGN)
    q1 = half(qs + 4, ALIGN)
    a0 = tl.load(grid + (q0 & 255))
    b0 = tl.load(grid + (q0 >> 8))
    a1 = tl.load(grid + (q1 & 255))
    b1 = tl.load(grid + (q1 >> 8))
    aux = word(src + 66 + s * 4, ALIGN)
    d = f16(half(src, ALIGN)) * field(aux, magic, 28, 4, MINUS=-0.5) * 0.5
    signs = aux >> (c * 7)
    return (
        (signed8(a0, b0, magic, even_signs(signs)), signed8(a1, b1, magic, even_signs(signs >> 14))),
        (),
        (d,),
        (),
        (),
    )


@triton.jit
def iq3_s(src, lane, magic, grid, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    s = lane // 2
    c = lane % 2
    qs = src + 2 + s * 8 + c * 2
    q0 = half(qs, ALIGN)
    q1 = half(qs + 4, ALIGN)
    high = byte(src + 66 + s) << 8 >> (c * 2)
    a0 = tl.load(grid + ((q0 & 255) | (high & 256)))
    b0 = tl.load(grid + ((q0 >> 8) | ((high >> 1) & 256)))
    a1 = tl.load(grid + ((q1 & 255) | ((high >> 4) & 256)))
    b1 = tl.load(grid + ((q1 >> 8) | ((high >> 5) & 256)))
    signs0 = byte(src + 74 + s * 4 + c)
    signs1 = byte(src + 76 + s * 4 + c)
    scale = byte(src + 106 + s // 2) >> (s % 2 * 4)
    d = f16(half(src, ALIGN)) * field(scale, magic, 0, 4, MINUS=-0.5) * 2.0
    return (signed8(a0, b0, magic, signs0), signed8(a1, b1, magic, signs1)), (), (d,), (), ()


@triton.jit
def shifted8(w, magic):
    """Eight times 4 (grid +- 1/8): the nibbles of `w` minus 4.5. [LANES, 8] float32.

    The nibbles of a row of the IQ1 grid hold 4 (grid + 1); the caller has added one for plus.
    """
    return join8(
        field(w << 8, magic, 8, 4, MINUS=4.5),  # at bit 0 the mantissa has no room for the half
        field(w, magic, 4, 4, MINUS=4.5),
        field(w, magic, 8, 4, MINUS=4.5),
        field(w, magic, 12, 4, MINUS=4.5),
        field(w, magic, 16, 4, MINUS=4.5),
        field(w, magic, 20, 4, MINUS=4.5),
        field(w, magic, 24, 4, MINUS=4.5),
        field(w, magic, 28, 4, MINUS=4.5),
    )


@triton.jit
def iq1_s(src, lane, magic, grid, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    s = lane // 2
    c = lane % 2
    head = half(src + 34 + s * 2, ALIGN)
    qs = src + 2 + s * 4 + c
    high = (head << 8) >> (c * 3)
    w0 = tl.load(grid + (byte(qs) | (high & 0x700)))
    w1 = tl.load(grid + (byte(qs + 2) | ((high >> 6) & 0x700)))
    d = f16(half(src, ALIGN)) * field(head, magic, 12, 3, MINUS=-0.5) * 0.5
    up = tl.where(head < 0x8000, 0x11111111, 0)
    return (shifted8(w0 | up, magic), shifted8(w1 | up, magic)), (), (d,), (), ()


@triton.jit
def iq1_m(src, lane, magic, grid, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    s = lane // 2
    c = lane % 2
    qs = src + s * 4 + c
    high0 = byte(src + 32 + s * 2) >> (c * 4)
    high1 = byte(src + 33 + s * 2) >> (c * 4)
    w0 = tl.load(grid + (byte(qs) | ((high0 << 8) & 0x700)))
    w1 = tl.load(grid + (byte(qs + 2) | ((high1 << 8) & 0x700)))
    s01, s23 = words(src + 48, ALIGN)
    low = ((s01 >> 12) & 0x000F) | ((s01 >> 24) & 0x00F0)
    d = f16(low | ((s23 >> 4) & 0x0F00) | ((s23 >> 16) & 0xF000)) * 0.5
    scales = half(src + 48 + s // 2 * 2, ALIGN) >> (s % 2 * 6)
    scale0 = field(scales, magic, 0, 3, MINUS=-0.5)
    scale1 = field(scales, magic, 3, 3, MINUS=-0.5)
    w0 = w0 | tl.where((high0 & 8) == 0, 0x11111111, 0)
    w1 = w1 | tl.where((high1 & 8) == 0, 0x11111111, 0)
    return (shifted8(w0, magic), shifted8(w1, magic)), (scale0, scale1), (d,), (), ()


@triton.jit
def iq4_xs(src, lane, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
    s = lane // 2
    head = word(src, ALIGN)
    low = byte(src + 4 + s // 2) >> (s % 2 * 4)
    a, b = words(src + 8 + s * 16 + lane % 2 * 8, ALIGN)
    high = head >> (16 + s * 2)
    d = f16(head) * field((low & 15) | ((high & 3) << 4), magic, 0, 6, MINUS=32)
    return (lookup8(table, a, b, 0), lookup8(table, a, b, 4)), (), (d,), (), ()
