"""The two programs that every type shares: dequantise a tensor, and multiply a few rows by one.

[Note: Decoders]
How a type lies in its bytes is written once, as two functions of a lane of a block, which know nothing of memory but
the address of the block:

    CHUNKS(lane, PER_BLOCK) -> at, offsets, own
        The lane makes chunk k, 8 contiguous elements, for each of `offsets`, from element at + offsets[k] of the block
        on. Where `own` is not empty, own[0] says whether the chunks after the first are the lane's at all.
    DECODE(src, lane, magic, table, ALIGN, PER_BLOCK) -> q, scale, d, minimum, minus
        Tuples, empty where the type has no such thing. Chunk k is q[k] d[0] scale[k] + minus[0] minimum[k], where q
        is [LANES, 8] small exact numbers and the others are one number for each lane.

PER_BLOCK is the number of lanes that share a block; the K-quants can be shared in two ways. To dequantise is to work
this out and store it; to multiply is to sum q x over a chunk and to scale the sum.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

from .dependent import gdc_wait


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def eight(chunk, SHAPE: tl.constexpr):
    """The eight numbers of each lane's chunk as tensors of SHAPE. Registers are renamed, nothing moves."""
    even, odd = tl.split(tl.reshape(chunk, (chunk.shape[0], 2, 2, 2)))
    y04, y26 = tl.split(even)
    y15, y37 = tl.split(odd)
    y0, y4 = tl.split(y04)
    y1, y5 = tl.split(y15)
    y2, y6 = tl.split(y26)
    y3, y7 = tl.split(y37)
    return (
        tl.reshape(y0, SHAPE),
        tl.reshape(y1, SHAPE),
        tl.reshape(y2, SHAPE),
        tl.reshape(y3, SHAPE),
        tl.reshape(y4, SHAPE),
        tl.reshape(y5, SHAPE),
        tl.reshape(y6, SHAPE),
        tl.reshape(y7, SHAPE),
    )


@triton.jit
def product(each, common, K: tl.constexpr):
    """What chunk K is multiplied by: a number of its own, one that all chunks share, or both."""
    if len(each) == 0:
        p = common[0]
    elif len(common) == 0:
        p = each[K]
    else:
        p = common[0] * each[K]
    return p


@triton.jit(do_not_specialize=["n_blocks"])
def dequantize(
    src,
    out,
    n_blocks,
    table,
    CHUNKS: tl.constexpr,
    DECODE: tl.constexpr,
    BYTES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Store the elements of all blocks of `src` to `out`; DEPENDENT: see dependent.py.

    The program's own offset is 64-bit and scalar, offsets within a program are 32-bit: more than 2^31 elements cost
    nothing. `n_blocks >> 31` is zero, which the compiler cannot know. [Note: Magic]
    """
    first = tl.program_id(0) * (LANES // PER_BLOCK)
    lane = tl.arange(0, LANES)
    block = tl.minimum(lane // PER_BLOCK, n_blocks - 1 - first)  # [Note: Tail]
    src += first.to(tl.int64) * BYTES
    out += first.to(tl.int64) * ELEMENTS
    magic = 0x4B000000 + (n_blocks >> 31)
    at, offsets, own = CHUNKS(lane % PER_BLOCK, PER_BLOCK)
    if DEPENDENT:
        gdc_wait()
    q, scale, d, minimum, minus = DECODE(src + block * BYTES, lane % PER_BLOCK, magic, table, ALIGN, PER_BLOCK)
    out += block * ELEMENTS + at
    for k in tl.static_range(len(q)):
        y = q[k] * product(scale, d, k)[:, None]
        if len(minus) > 0:
            y = y + product(minimum, minus, k)[:, None]
        chunk = (out + offsets[k])[:, None] + tl.arange(0, 8)[None, :]
        if k == 0 or len(own) == 0:
            tl.store(chunk, y.to(out.dtype.element_ty))
        else:
            tl.store(chunk, y.to(out.dtype.element_ty), mask=own[0][:, None])


@triton.jit(do_not_specialize=["n_rows", "m"])
def skinny(
    src,
    x,
    bias,
    out,
    n_rows,
    m,
    table,
    CHUNKS: tl.constexpr,
    DECODE: tl.constexpr,
    BYTES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """out[m, n_rows] = x[m, BLOCKS * ELEMENTS] src^T + bias, summed in float32, for m <= M, a power of two.

    A program makes ROWS columns of `out`. LANES lanes walk over the blocks of a row side by side, and a thread is the
    same lane of all ROWS rows, so that the x it loads and widens serves them all. Every tensor begins as one dimension
    that is wrapped around the threads, which makes ROWS and M dimensions of registers: nothing crosses lanes before
    the last sum. Rows past the end repeat the last one and are not stored.
    """
    first = tl.program_id(0) * ROWS
    SHARE: tl.constexpr = LANES // PER_BLOCK
    magic = 0x4B000000 + (n_rows >> 31)
    row_bytes = BLOCKS * BYTES
    lane = tl.arange(0, LANES)
    spread = tl.arange(0, ROWS * LANES)
    part = spread % LANES
    x_part = tl.arange(0, M * LANES) % LANES
    src += first.to(tl.int64) * row_bytes
    row = src + tl.minimum(spread // LANES, n_rows - 1 - first) * row_bytes
    at, offsets, own = CHUNKS(x_part % PER_BLOCK, PER_BLOCK)
    x += tl.minimum(tl.arange(0, M * LANES) // LANES, m - 1) * (BLOCKS * ELEMENTS) + at
    total = tl.full([M, ROWS, LANES], 0.0, tl.float32)
    for b in range(0, BLOCKS, SHARE):
        block = tl.minimum(b + part // PER_BLOCK, BLOCKS - 1)
        q, scale, d, minimum, minus = DECODE(row + block * BYTES, part % PER_BLOCK, magic, table, ALIGN, PER_BLOCK)
        x_block = x + tl.minimum(b + x_part // PER_BLOCK, BLOCKS - 1) * ELEMENTS
        products = tl.full([M, ROWS, LANES], 0.0, tl.float32)
        sums = tl.full([M, ROWS, LANES], 0.0, tl.float32)
        for k in tl.static_range(len(q)):
            chunk = (x_block + offsets[k])[:, None] + tl.arange(0, 8)[None, :]
            if k == 0 or len(own) == 0:
                xk = tl.load(chunk).to(tl.float32)
            else:
                xk = tl.load(chunk, mask=own[0][:, None], other=0.0).to(tl.float32)
            xs = eight(xk, (M, 1, LANES))
            qs = eight(q[k], (1, ROWS, LANES))
            dot = xs[0] * qs[0]
            for i in tl.static_range(1, 8):
                dot += xs[i] * qs[i]
            if len(scale) > 0:
                dot *= tl.reshape(scale[k], (1, ROWS, LANES))
            products += dot
            if len(minus) > 0:
                sum_x = xs[0] + xs[1]
                for i in tl.static_range(2, 8):
                    sum_x += xs[i]
                if len(minimum) > 0:
                    sum_x *= tl.reshape(minimum[k], (1, ROWS, LANES))
                sums += sum_x
        if len(d) > 0:
            products *= tl.reshape(d[0], (1, ROWS, LANES))
        if len(minus) > 0:
            products += sums * tl.reshape(minus[0], (1, ROWS, LANES))
        if BLOCKS % SHARE != 0:  # a block taken again, to have an address, counts once
            products = tl.where((b + lane // PER_BLOCK < BLOCKS)[None, None, :], products, 0.0)
        total += products
    y = tl.reduce(total, 2, add)  # not tl.sum: no interpreter has it that was chosen after Triton was imported
    rows = first + tl.arange(0, ROWS)
    if bias is not None:
        y += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)[None, :]
    place = tl.arange(0, M)[:, None] * n_rows + rows[None, :]
    mask = (tl.arange(0, M) < m)[:, None] & (rows < n_rows)[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)
