"""The arithmetic of tiles.py: a block of 16 or 32 rows of the weight times up to eight rows of x.

[Note: Minima]
Minus minimum_j times the sum of x over group j, added up over the groups of a block, is a product of matrices too: of
the minima, integers, and of the sums. The sums are made by the instruction with x as the first matrix and, as the
second, ones in column j and zeros elsewhere: then lane 4 g + c has the sums of row g of x over groups 2 c and 2 c + 1,
as the second matrix of a further instruction needs them, for which they are split into two bfloat16: to 2^-17 of each.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

from .matrix import as_bfloat16, both, load_x, mma


@triton.jit
def pair(low, high):
    """Two float32 that are bfloat16 as a word."""
    return ((low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | (high.to(tl.int32, bitcast=True) & -0x10000)


@triton.jit
def upscaled(w, UP: tl.constexpr, EMULATE: tl.constexpr):
    """A pair of bfloat16 times 2^(64 - UP)."""
    if EMULATE:
        low, high = both(w)
        w = pair(low * 2.0 ** (64 - UP), high * 2.0 ** (64 - UP))
    else:
        scale = tl.full(w.shape, ((191 - UP) << 7) * 0x10001, tl.int32)
        minus_zero = tl.full(w.shape, -0x7FFF8000, tl.int32)
        w = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [w, scale, minus_zero], dtype=tl.int32, is_pure=True, pack=1
        )
    return w


@triton.jit
def load_runs(ptr, valid, OFFSETS: tl.constexpr, U: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """The runs of unit U from each lane's `ptr`, as `load_x` gives them; WIDTH elements of x lie side by side."""
    raw = ()
    for i in tl.static_range(0, len(OFFSETS[0]), WIDTH // 4):
        if WIDTH == 8 and ptr.dtype.element_ty == tl.bfloat16:
            four = (ptr + OFFSETS[U][i]).to(tl.pointer_type(tl.int32), bitcast=True)[:, None] + tl.arange(0, 4)[None, :]
            if ALL:
                y = tl.load(four)
            else:
                y = tl.load(four, mask=valid[:, None], other=0)
            even, odd = tl.split(tl.reshape(y, (ptr.shape[0], 2, 2)))
            w0, w2 = tl.split(even)
            w1, w3 = tl.split(odd)
            raw += (w0, w1, w2, w3)
        else:
            for k in tl.static_range(WIDTH // 4):
                raw += load_x(ptr + OFFSETS[U][i + k], (0,), valid, ALL)
    return raw


@triton.jit
def run_of_x(raw, RUN: tl.constexpr, UP: tl.constexpr, EMULATE: tl.constexpr):
    """A run of what `load_x` gives times 2^(64 - UP), as elements (0, 2) and (1, 3) in pairs of bfloat16: one such pair
    of words for each bfloat16 that an element takes, two of float16, three of float32."""
    if raw[0].dtype == tl.int32:
        low = raw[2 * RUN]
        high = raw[2 * RUN + 1]
        if EMULATE:
            even = (low & 0xFFFF) | (high << 16)
            odd = ((low >> 16) & 0xFFFF) | (high & -0x10000)
        else:  # Triton's compiler makes four instructions of these
            even, odd = tl.inline_asm_elementwise(
                "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
                "=&r,=&r,r,r",
                [low, high],
                dtype=(tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        terms = upscaled(even, UP, EMULATE), upscaled(odd, UP, EMULATE)
    else:
        BY: tl.constexpr = 2.0 ** (64 - UP)
        x = (
            raw[4 * RUN].to(tl.float32) * BY,
            raw[4 * RUN + 1].to(tl.float32) * BY,
            raw[4 * RUN + 2].to(tl.float32) * BY,
            raw[4 * RUN + 3].to(tl.float32) * BY,
        )
        terms = as_bfloat16(x, 2 if raw[0].dtype == tl.float16 else 3)
    return terms


@triton.jit
def first_matrix(upper, lower, RUN: tl.constexpr):
    """A run of rows g and of rows g + 8 of a tile."""
    return upper[2 * RUN], lower[2 * RUN], upper[2 * RUN + 1], lower[2 * RUN + 1]


@triton.jit
def times_x(a, terms, total, WARPS: tl.constexpr, EMULATE: tl.constexpr):
    """`total` and the products of four words with all terms of a run of x."""
    for k in tl.static_range(len(terms) // 2):
        total = mma(a, (terms[2 * k], terms[2 * k + 1]), total, WARPS, EMULATE)
    return total


@triton.jit
def fma4(total, upper, lower, sums):
    """`total` and a tile of `sums`, rows g times `upper` and rows g + 8 times `lower`."""
    return (
        total[0] + upper * sums[0],
        total[1] + upper * sums[1],
        total[2] + lower * sums[2],
        total[3] + lower * sums[3],
    )


@triton.jit
def minus_zeros(ZERO: tl.constexpr, lane, n):
    """The first matrix full of -ZERO, below 256, times 2^-133.

    `n` is not negative and has no high bits, so that what is added is zero. The assembler cannot know that: it would
    otherwise make the four registers anew for each instruction.
    """
    w = tl.full(lane.shape, ZERO * 0x10001 - 0x7FFF8000, tl.int32)
    return w + (n >> 28), w + (n >> 29), w + (n >> 30), w + (n >> 31)


@triton.jit
def sums_of(first, second, sums, lane, J: tl.constexpr, UP: tl.constexpr, WARPS: tl.constexpr, EMULATE: tl.constexpr):
    """`sums` and those of two runs of x of group J. [Note: Minima]

    The words of both make the first matrix as they lie, which splits each sum between rows g and g + 8.
    """
    ones = tl.where(lane % 32 // 4 == J, (0x3F80 + (UP << 7)) * 0x10001, 0)
    for i in tl.static_range(len(first) // 2):
        a = first[2 * i], first[2 * i + 1], second[2 * i], second[2 * i + 1]
        sums = mma(a, (ones, ones), sums, WARPS, EMULATE)
    return sums


@triton.jit
def nearest(x):
    """The bfloat16 nearest to `x`, in float32; ties away from zero."""
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def minima_times(sums, upper, lower, WARPS: tl.constexpr, EMULATE: tl.constexpr):
    """A tile of minima, of rows g and g + 8, times `sums`, both parts of each."""
    s0 = sums[0] + sums[2]
    s1 = sums[1] + sums[3]
    h0 = nearest(s0)
    h1 = nearest(s1)
    nothing = tl.full(s0.shape, 0.0, tl.float32)
    b = pair(h0, h1), pair(nearest(s0 - h0), nearest(s1 - h1))
    return mma((upper, lower, upper, lower), b, (nothing, nothing, nothing, nothing), WARPS, EMULATE)


@triton.jit
def known(d, valid, ALL: tl.constexpr):
    return d if ALL else tl.where(valid, d, 0.0)


@triton.jit
def add_block(
    totals,
    at,
    x,
    lane,
    valid,
    magic,
    zeros,
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    UPS: tl.constexpr,
    GROUPS: tl.constexpr,
    AT: tl.constexpr,
    ALIGN: tl.constexpr,
    ALL: tl.constexpr,
    WARPS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """`totals` and the products of a block of each of the rows `at` with the runs `x`, a tile for every two rows."""
    TILES: tl.constexpr = len(at) // 2
    c = lane % 4
    nothing = tl.full(lane.shape, 0.0, tl.float32)
    nothing = nothing, nothing, nothing, nothing
    heads = ()
    for r in tl.static_range(2 * TILES):
        heads += (HEAD(at[r], c, magic, AT, ALIGN),)
    sums = (nothing,) * TILES
    sums_of_x = nothing
    RUNS: tl.constexpr = len(UPS) // len(GROUPS[0])  # of a group
    for u in tl.static_range(len(GROUPS)):
        units = ()
        for r in tl.static_range(2 * TILES):
            units += (UNIT(at[r], c, heads[r][0], magic, u, AT, ALIGN),)
        for j in tl.static_range(len(GROUPS[0])):
            xs = ()
            start = nothing
            for k in tl.static_range(RUNS):
                xs += (run_of_x(x, (u * len(GROUPS[0]) + j) * RUNS + k, UPS[j * RUNS + k], EMULATE),)
                if len(zeros) > 0:
                    start = times_x(zeros[UPS[j * RUNS + k] // 4], xs[k], start, WARPS, EMULATE)
            if len(heads[0][3]) > 0:
                sums_of_x = sums_of(xs[0], xs[1], sums_of_x, lane, GROUPS[u][j], UPS[j * RUNS], WARPS, EMULATE)
            next_sums = ()
            for t in tl.static_range(TILES):
                products = start
                upper, upper_scale = units[2 * t]
                lower, lower_scale = units[2 * t + 1]
                for k in tl.static_range(RUNS):
                    a = first_matrix(upper, lower, j * RUNS + k)
                    products = times_x(a, xs[k], products, WARPS, EMULATE)
                if len(upper_scale) > 0:
                    products = fma4(sums[t], upper_scale[j], lower_scale[j], products)
                next_sums += (products,)
            sums = next_sums
    next_totals = ()
    for t in tl.static_range(TILES):
        _, d0, minus0, minima0 = heads[2 * t]
        _, d1, minus1, minima1 = heads[2 * t + 1]
        total = fma4(totals[t], known(d0[0], valid, ALL), known(d1[0], valid, ALL), sums[t])
        if len(minus0) > 0:
            least = minima_times(sums_of_x, minima0[0], minima1[0], WARPS, EMULATE)
            total = fma4(total, known(minus0[0], valid, ALL), known(minus1[0], valid, ALL), least)
        next_totals += (total,)
    return next_totals
