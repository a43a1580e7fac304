"""The program that multiplies a few rows by a quantised weight with matrix instructions: `mma.sync`, NVIDIA's.

[Note: Quads]
The instruction multiplies a 16 x 16 by a 16 x 8 matrix of bfloat16 and adds a 16 x 8 matrix of float32. Lane 4 g + c
of a warp holds four elements of row g and four of row g + 8 of the first, its *run*; four elements of column g of the
second; and of the sum elements 2 c and 2 c + 1 of rows g and g + 8. So every lane unpacks what it loads itself, for two
rows of the weight, and the integers need not move. They are exact in bfloat16, x is (in two or three bfloat16 where it
is float16 or float32), and products and sums are float32: for every sub-block of the weight its own sum, to be scaled.

With fewer than eight rows of x the columns would be idle and the quads would read eight rows of the weight that are far
apart, eight lines of the cache for each load. Instead, G = 8 / M quads go along a row of the weight, each on its own
units, and column (q, m) holds row m of x for the units of quad q. Of quad q's sums only columns (q, 0) to (q, M - 1)
mean something; they are told apart at the end. An element of the weight then costs the same for every M <= 8.

[Note: Zero]
fragments.py gives integers that are too large by a constant, 128 and the type's zero point. Every sum of products
begins as the sum of x times minus that constant, which the same instruction makes.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

from .programs import add


@triton.jit
def both(w):
    """The two bfloat16 of a word in float32."""
    return (w << 16).to(tl.float32, bitcast=True), (w & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def dot4(a0, a1, b0, b1, WARPS: tl.constexpr):
    """What the instruction makes of half of the first matrix: [lanes] of runs a, [lanes] of runs b -> two columns."""
    p0, p1 = both(a0)
    p2, p3 = both(a1)
    q0, q1 = both(b0)
    q2, q3 = both(b1)
    A: tl.constexpr = (WARPS, 8, 1, 4)
    B: tl.constexpr = (WARPS, 1, 8, 4)
    y = tl.reshape(p0, A) * tl.reshape(q0, B) + tl.reshape(p1, A) * tl.reshape(q1, B)
    y += tl.reshape(p2, A) * tl.reshape(q2, B) + tl.reshape(p3, A) * tl.reshape(q3, B)
    return tl.split(tl.reshape(tl.reduce(y, 3, add), (WARPS * 32, 2)))


@triton.jit
def mma(a, b, c, WARPS: tl.constexpr, EMULATE: tl.constexpr):
    """The matrix instruction: a = (row g, row g + 8, row g, row g + 8) in pairs, b, c as in [Note: Quads]."""
    if EMULATE:
        low0, low1 = dot4(a[0], a[2], b[0], b[1], WARPS)
        high0, high1 = dot4(a[1], a[3], b[0], b[1], WARPS)
        d = (c[0] + low0, c[1] + low1, c[2] + high0, c[3] + high1)
    else:
        d = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return d


@triton.jit
def load_x(ptr, offsets, valid, ALL: tl.constexpr):
    """Four elements of x at each of `offsets` from each lane's `ptr`: two words of bfloat16, or four numbers."""
    raw = ()
    for i in tl.static_range(len(offsets)):
        run = ptr + offsets[i]
        if ptr.dtype.element_ty == tl.bfloat16:
            two = run.to(tl.pointer_type(tl.int32), bitcast=True)[:, None] + tl.arange(0, 2)[None, :]
            if ALL:
                raw += tl.split(tl.load(two))
            else:
                raw += tl.split(tl.load(two, mask=valid[:, None], other=0))
        else:
            four = run[:, None] + tl.arange(0, 4)[None, :]
            if ALL:
                y = tl.load(four)
            else:
                y = tl.load(four, mask=valid[:, None], other=0.0)
            even, odd = tl.split(tl.reshape(y, (ptr.shape[0], 2, 2)))
            raw += tl.split(even) + tl.split(odd)  # elements 0, 2, 1, 3
    return raw


@triton.jit
def cut_off(x):
    """The bits of each number that a bfloat16 can hold, and what is left of it, exactly."""
    b0 = x[0].to(tl.int32, bitcast=True) & -0x10000
    b2 = x[1].to(tl.int32, bitcast=True) & -0x10000
    b1 = x[2].to(tl.int32, bitcast=True) & -0x10000
    b3 = x[3].to(tl.int32, bitcast=True) & -0x10000
    left = (
        x[0] - b0.to(tl.float32, bitcast=True),
        x[1] - b2.to(tl.float32, bitcast=True),
        x[2] - b1.to(tl.float32, bitcast=True),
        x[3] - b3.to(tl.float32, bitcast=True),
    )
    return (((b0 >> 16) & 0xFFFF) | b2, ((b1 >> 16) & 0xFFFF) | b3), left


@triton.jit
def as_bfloat16(x, TERMS: tl.constexpr):
    """A run of float32 as the sum of so many bfloat16: a pair of words for each."""
    terms = ()
    for _ in tl.static_range(TERMS):
        term, x = cut_off(x)
        terms += term
    return terms


@triton.jit
def run_of_x(raw, RUN: tl.constexpr):
    """A run as (0, 2) and (1, 3) in pairs of bfloat16: one such pair of words for each bfloat16 that an element takes,
    two of float16, three of float32."""
    if raw[0].dtype == tl.int32:
        low = raw[2 * RUN]
        high = raw[2 * RUN + 1]
        terms = ((low & 0xFFFF) | (high << 16), ((low >> 16) & 0xFFFF) | (high & -0x10000))
    else:
        x = (
            raw[4 * RUN].to(tl.float32),
            raw[4 * RUN + 1].to(tl.float32),
            raw[4 * RUN + 2].to(tl.float32),
            raw[4 * RUN + 3].to(tl.float32),
        )
        terms = as_bfloat16(x, 2 if raw[0].dtype == tl.float16 else 3)
    return terms


@triton.jit
def run_times(upper, lower, terms, total, RUN: tl.constexpr, WARPS: tl.constexpr, EMULATE: tl.constexpr):
    """`total` and the products of a run of both rows with all terms of x."""
    a = (upper[2 * RUN], lower[2 * RUN], upper[2 * RUN + 1], lower[2 * RUN + 1])
    for k in tl.static_range(len(terms) // 2):
        total = mma(a, (terms[2 * k], terms[2 * k + 1]), total, WARPS, EMULATE)
    return total


@triton.jit
def scaled(total, sums, sums_of_x, decoded, valid, ROW: tl.constexpr, ALL: tl.constexpr):
    """`total` and the scaled sums of row g (ROW = 0) or g + 8 (1) over a unit: two columns."""
    _, _, scale, d, minimum, minus = decoded
    GROUPS: tl.constexpr = len(sums)
    p0 = sums[0][2 * ROW]
    p1 = sums[0][2 * ROW + 1]
    if len(scale) > 0:
        p0 *= scale[0]
        p1 *= scale[0]
        for j in tl.static_range(1, GROUPS):
            p0 += scale[j] * sums[j][2 * ROW]
            p1 += scale[j] * sums[j][2 * ROW + 1]
    common = d[0] if ALL else tl.where(valid, d[0], 0.0)
    t0 = total[0] + common * p0
    t1 = total[1] + common * p1
    if len(minus) > 0:
        q0 = sums_of_x[0][0]
        q1 = sums_of_x[0][1]
        if len(minimum) > 0:
            q0 *= minimum[0]
            q1 *= minimum[0]
            for j in tl.static_range(1, GROUPS):
                q0 += minimum[j] * sums_of_x[j][0]
                q1 += minimum[j] * sums_of_x[j][1]
        common = minus[0] * -0.0078125  # types with a minimum have no zero point: sums_of_x are -128 sums
        common = common if ALL else tl.where(valid, common, 0.0)
        t0 += common * q0
        t1 += common * q1
    return t0, t1


@triton.jit
def add_unit(
    total,
    upper,
    lower,
    x,
    valid,
    minus_zero,
    RUNS_OF_X: tl.constexpr,
    ALL: tl.constexpr,
    WARPS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """`total`, two columns for each of two rows, and the products of a unit of row g, `upper`, and g + 8, `lower`."""
    SIGNED: tl.constexpr = len(upper[1]) > 0
    GROUPS: tl.constexpr = max(1, len(upper[2]))
    RUNS: tl.constexpr = RUNS_OF_X // GROUPS
    nothing = tl.full([WARPS * 32], 0.0, tl.float32)
    zeros = (minus_zero, minus_zero)
    sums = ()
    sums_of_x = ()
    for j in tl.static_range(GROUPS):
        products = (nothing, nothing, nothing, nothing)
        xs = ()
        for r in tl.static_range(RUNS):
            xs += (run_of_x(x, j * RUNS + r),)
            if not SIGNED:
                products = run_times(zeros, zeros, xs[r], products, 0, WARPS, EMULATE)
        sums_of_x += (products,)
        for r in tl.static_range(RUNS):
            products = run_times(upper[0], lower[0], xs[r], products, j * RUNS + r, WARPS, EMULATE)
            if SIGNED:
                products = run_times(upper[1], lower[1], xs[r], products, j * RUNS + r, WARPS, EMULATE)
        sums += (products,)
    t0, t1 = scaled((total[0], total[1]), sums, sums_of_x, upper, valid, 0, ALL)
    t2, t3 = scaled((total[2], total[3]), sums, sums_of_x, lower, valid, 1, ALL)
    return t0, t1, t2, t3


@triton.jit
def of_own_columns(t0, t1, WARPS: tl.constexpr, M: tl.constexpr):
    """[lanes] two columns -> [rows, M], summed over the warps and the quads of a row."""
    G: tl.constexpr = 8 // M
    y = tl.reshape(tl.join(t0, t1), (WARPS, M, G, G, M))
    own = tl.arange(0, G)[:, None] == tl.arange(0, G)[None, :]
    y = tl.where(own[None, None, :, :, None], y, 0.0)
    return tl.reduce(tl.reduce(tl.reduce(y, 3, add), 2, add), 0, add)


@triton.jit(do_not_specialize=["n_rows", "m"])
def matrix(
    src,
    x,
    bias,
    out,
    n_rows,
    m,
    PLACES: tl.constexpr,
    DECODE: tl.constexpr,
    UNITS: tl.constexpr,
    MINUS_ZERO: tl.constexpr,
    BYTES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr,
    M: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """out[m, n_rows] = x[m, BLOCKS * ELEMENTS] src^T + bias, for m <= M, a power of two up to 8.

    A program makes 2 M columns of `out`; its warps share the units of these rows of the weight. Units past the end
    repeat the last one, with zeros for x and scale; rows past the end repeat the last one and are not stored.
    """
    G: tl.constexpr = 8 // M
    LAST: tl.constexpr = BLOCKS * UNITS - 1
    STEP: tl.constexpr = G * UNROLL * WARPS
    ALL: tl.constexpr = BLOCKS * UNITS % STEP == 0
    lane = tl.arange(0, WARPS * 32)
    g = lane % 32 // 4
    c = lane % 4
    magic = 0x43004300 + (n_rows >> 31)  # see bits.py [Note: Magic]
    first = tl.program_id(0) * (2 * M)
    src += first.to(tl.int64) * (BLOCKS * BYTES)
    left = n_rows - 1 - first
    src0 = src + tl.minimum(g // G, left) * (BLOCKS * BYTES)
    src1 = src + tl.minimum(g // G + M, left) * (BLOCKS * BYTES)
    x += tl.minimum(g % M, m - 1) * (BLOCKS * ELEMENTS)
    minus_zero = tl.full([WARPS * 32], MINUS_ZERO, tl.int32)
    zero = tl.full([WARPS * 32], 0.0, tl.float32)
    total = (zero, zero, zero, zero)
    for step in range(0, BLOCKS * UNITS, STEP):
        for i in tl.static_range(UNROLL):
            base = step + (lane // 32 * UNROLL + i) * G
            unit = base + g % G
            unit_x = base + g // M
            valid = unit <= LAST
            valid_x = unit_x <= LAST
            if not ALL:
                unit = tl.minimum(unit, LAST)
                unit_x = tl.minimum(unit_x, LAST)
            offset = unit // UNITS * BYTES
            at, offsets = PLACES(unit_x % UNITS, c)
            upper = DECODE(src0 + offset, unit % UNITS, c, magic, ALIGN)
            lower = DECODE(src1 + offset, unit % UNITS, c, magic, ALIGN)
            raw_x = load_x(x + (unit_x // UNITS * ELEMENTS + at), offsets, valid_x, ALL)
            total = add_unit(total, upper, lower, raw_x, valid, minus_zero, len(offsets), ALL, WARPS, EMULATE)
    rows = first + tl.arange(0, M)
    column = tl.arange(0, M)
    for i in tl.static_range(2):
        y = of_own_columns(total[2 * i], total[2 * i + 1], WARPS, M)
        if bias is not None:
            y += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)[:, None]
        place = out + column[None, :] * n_rows + rows[:, None]
        tl.store(place, y.to(out.dtype.element_ty), mask=(rows < n_rows)[:, None] & (column < m)[None, :])
        rows += M
