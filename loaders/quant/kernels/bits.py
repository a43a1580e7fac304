"""What every decoder is made of: where a lane works, how it reads words, how bits become floats.

[Note: Lanes]
A kernel is written for one *lane*: every tensor in it is one-dimensional over `LANES` lanes, and lane = thread (or a
few lanes a thread, when `LANES` exceeds the threads of a program). A block of quantised bytes is shared by
`PER_BLOCK` neighbouring lanes. A lane reads the words it needs straight from global memory, unpacks the scales that
these words need once, and makes *chunks* of 8 contiguous elements: one 16-byte store for bf16 and f16. Neighbouring
lanes make neighbouring chunks, so that a warp's stores fill whole 32-byte sectors; two chunks to a lane measured
faster than four. Nothing crosses lanes: no shared memory, no barrier, no layout conversion, and the machine code is
what one would write by hand. (For float32 output Triton does exchange chunks among lanes, to make its 16-byte stores
neighbours.) What is done with the chunks is not the decoders' business but that of programs.py.

[Note: Loads first]
The compiler cannot know that `src` and `out` do not overlap, and moves no load up over a store. All chunks are
therefore decoded before the first store; otherwise a lane waits for memory once for each chunk.

[Note: Alignment]
GGUF blocks are not padded: an 18-byte block starts on any even address, a 17-byte one anywhere. `ALIGN` is what is
known about all blocks of the tensor (the greatest common divisor of block size, address and 16): `word` loads 32 bits
as one, two or four pieces and joins them; `words` and `quad` load 64 and 128 bits at once where they may, and at odd
addresses `words` shifts its words out of the aligned ones they lie in. Two-byte alignment costs half an instruction per
element at most, less than pairing blocks and shifting across them would, and there is no odd tail.

[Note: Tail]
The lanes of the last program that have no block of their own recompute the last block and store the same values over
it again. That is harmless, and it spares a mask on every load and store.

[Note: Magic]
Integers become floats without a conversion instruction: with the bits of q at mantissa position p and the exponent of
2^(23 - p), a float is exactly 2^(23 - p) + q. One three-input logic operation masks the field out of the word and
puts the exponent in, one subtraction takes 2^(23 - p) off again, together with the offset of a signed or centred
field. Both are exact. A field beyond the mantissa (bits 23 to 31) is shifted down by whole bytes first, so that the
fields of a word share the shifts.
The exponent comes as a run-time value, `magic`: the assembler keeps it in a register and needs one instruction for
(w & mask) ^ magic, where two constants would take two.

[Note: Exactness]
Every product of a scale, a sub-scale and a quant fits float32's 24 bits, so that nothing is rounded before the last
addition, and a compiler that contracts d * q - m into one fused operation changes no bit. Results are then rounded
once to the output type (nearest even). That makes kernels and reference equal as bits.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunks_16(lane, PER_BLOCK: tl.constexpr):
    """Where a lane's chunks lie in its block: the first, the others from there, and whether these are its own.

    Here: lanes 2 s, 2 s + 1 make the four chunks of the 32 elements from 32 s on.
    """
    return lane // 2 * 32 + lane % 2 * 8, (0, 16), ()


@triton.jit
def byte(ptr):
    """The unsigned byte at each lane's `ptr`, as int32."""
    return tl.load(ptr).to(tl.int32)


@triton.jit
def half(ptr, ALIGN: tl.constexpr):
    """The 16-bit little-endian word at each lane's `ptr`, zero-extended to int32."""
    if ALIGN % 2 == 0:
        return tl.load(ptr.to(tl.pointer_type(tl.uint16), bitcast=True)).to(tl.int32)
    return byte(ptr) | (byte(ptr + 1) << 8)


@triton.jit
def word(ptr, ALIGN: tl.constexpr):
    """The 32-bit little-endian word at each lane's `ptr`, as int32. [Note: Alignment]"""
    if ALIGN % 4 == 0:
        return tl.load(ptr.to(tl.pointer_type(tl.int32), bitcast=True))
    return half(ptr, ALIGN) | (half(ptr + 2, ALIGN) << 16)


@triton.jit
def unsigned_word(ptr):
    return tl.load(ptr.to(tl.pointer_type(tl.uint32), bitcast=True)).to(tl.uint64)


@triton.jit
def straddling_words(ptr):
    """The two 32-bit words at any `ptr`, from the two or three aligned words they lie in: no other byte is touched
    but those that share a word with theirs, and no allocation ends within a word."""
    past = (ptr.to(tl.uint64) & 3).to(tl.int32)
    first = ptr - past
    w0 = unsigned_word(first)
    w1 = unsigned_word(first + 4)
    w2 = unsigned_word(first + 4 + ((past + 3) & 4))
    shift = (past * 8).to(tl.uint64)
    return ((w1 << 32 | w0) >> shift).to(tl.int32), ((w2 << 32 | w1) >> shift).to(tl.int32)


@triton.jit
def words(ptr, ALIGN: tl.constexpr):
    """The two 32-bit words at each lane's `ptr`: one 8-byte load where the alignment allows it."""
    if ALIGN % 8 == 0:
        pair = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        return tl.split(tl.load(pair[:, None] + tl.arange(0, 2)[None, :]))
    if ALIGN % 4 == 0:
        return word(ptr, ALIGN), word(ptr + 4, ALIGN)
    return straddling_words(ptr)


@triton.jit
def quad(ptr, ALIGN: tl.constexpr):
    """The four 32-bit words at each lane's `ptr`: one 16-byte load where the alignment allows it."""
    if ALIGN % 16 == 0:
        four = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        w = tl.load(four[:, None] + tl.arange(0, 4)[None, :])
        even, odd = tl.split(tl.reshape(w, (ptr.shape[0], 2, 2)))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
    else:
        w0, w1 = words(ptr, ALIGN)
        w2, w3 = words(ptr + 8, ALIGN)
    return w0, w1, w2, w3


@triton.jit
def f16(bits):
    """The float16 in the low 16 bits, widened to float32 (subnormals kept)."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def minus_f16(bits):
    """Minus that number. By its bit: in Triton, -x is 0 - x, which loses the sign of a zero."""
    return f16(bits ^ 0x8000)


@triton.jit
def field(w, magic, AT: tl.constexpr, BITS: tl.constexpr, MINUS: tl.constexpr = 0, FLIP: tl.constexpr = 0):
    """Bits AT .. AT + BITS - 1 of `w`, xor `FLIP`, as a number, minus `MINUS`, in float32. [Note: Magic]"""
    SHIFT: tl.constexpr = (AT + BITS - 16) // 8 * 8 if AT + BITS > 23 else 0
    P: tl.constexpr = AT - SHIFT
    MASK: tl.constexpr = ((1 << BITS) - 1) << P
    EXPONENT: tl.constexpr = (P << 23) - (FLIP << P)
    x = ((w >> SHIFT) & MASK) ^ (magic - EXPONENT)
    return x.to(tl.float32, bitcast=True) - (2.0 ** (23 - P) + MINUS)


@triton.jit
def join8(y0, y1, y2, y3, y4, y5, y6, y7):
    """Eight values of each lane side by side: [LANES, 8]. Registers are renamed, nothing moves."""
    even = tl.join(tl.join(y0, y4), tl.join(y2, y6))
    odd = tl.join(tl.join(y1, y5), tl.join(y3, y7))
    return tl.reshape(tl.join(even, odd), (y0.shape[0], 8))  # last three index bits: 4, 2, 1


@triton.jit
def octet(a, b, magic, AT: tl.constexpr, BITS: tl.constexpr, MINUS: tl.constexpr = 0, FLIP: tl.constexpr = 0):
    """The fields at bit AT of the eight bytes of the words a, b: [LANES, 8] float32."""
    return join8(
        field(a, magic, AT, BITS, MINUS, FLIP),
        field(a, magic, AT + 8, BITS, MINUS, FLIP),
        field(a, magic, AT + 16, BITS, MINUS, FLIP),
        field(a, magic, AT + 24, BITS, MINUS, FLIP),
        field(b, magic, AT, BITS, MINUS, FLIP),
        field(b, magic, AT + 8, BITS, MINUS, FLIP),
        field(b, magic, AT + 16, BITS, MINUS, FLIP),
        field(b, magic, AT + 24, BITS, MINUS, FLIP),
    )


@triton.jit
def lookup(table, w, AT: tl.constexpr):
    """The entry of a 16-value float32 table that the nibble of `w` at bit AT names. The table is one cache line."""
    return tl.load(table + ((w >> AT) & 15))


@triton.jit
def lookup8(table, a, b, AT: tl.constexpr):
    """Like `octet`, for nibbles that index a table of 16 values."""
    return join8(
        lookup(table, a, AT),
        lookup(table, a, AT + 8),
        lookup(table, a, AT + 16),
        lookup(table, a, AT + 24),
        lookup(table, b, AT),
        lookup(table, b, AT + 8),
        lookup(table, b, AT + 16),
        lookup(table, b, AT + 24),
    )


@triton.jit
def e2m1_pair(w, NIBBLE: tl.constexpr):
    """Nibbles NIBBLE and NIBBLE + 4 of `w` as e2m1 numbers, doubled, in float32.

    Three bits of exponent and mantissa at the same place in a float16 make 2^-15 times the doubled number, zero and
    subnormal included, and two float16 are made at a time. Adding zero makes minus zero plus zero, as ggml has it.
    """
    UP: tl.constexpr = 12 - 4 * NIBBLE
    sign = (w << UP) & -0x7FFF8000  # 0x80008000, which as an int32 is negative
    if UP >= 3:
        pair = ((w << (UP - 3)) & 0x0E000E00) | sign
    else:
        pair = ((w >> (3 - UP)) & 0x0E000E00) | sign
    return f16(pair) * 32768.0 + 0.0, f16(pair >> 16) * 32768.0 + 0.0


@triton.jit
def e2m1_octet(a, b, NIBBLE: tl.constexpr):
    """Like `octet`, for the e2m1 numbers, doubled, in the low (NIBBLE = 0) or high (1) nibbles."""
    a0, a2 = e2m1_pair(a, NIBBLE)
    a1, a3 = e2m1_pair(a, NIBBLE + 2)
    b0, b2 = e2m1_pair(b, NIBBLE)
    b1, b3 = e2m1_pair(b, NIBBLE + 2)
    return join8(a0, a1, a2, a3, b0, b1, b2, b3)
