"""The program that multiplies up to eight rows by a quantised weight with matrix instructions, 16 rows of it a tile.

[Note: Tiles]
The lanes and their shares are as in matrix.py [Note: Quads], but all eight quads of a warp have rows of the weight of
their own, and a warp may have two tiles, for which it loads and unpacks x once. Columns that x has no row for are made
from its last one and are not stored. The bytes of the weight come through shared memory (staging.py); x, which all
programs read, does not.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

from .programs import add
from .staging import close_group, copy16, reserve, sync_warp, wait_for_all_but
from .tile_products import add_block, load_runs, minus_zeros

UNSCALE = tl.constexpr(2.0**69)  # x is multiplied by 2^64 and integers are multiples of 2^-133: integers.py


@triton.jit
def copy_segment(
    starts,
    segment,
    buffer,
    lane,
    ROW: tl.constexpr,
    SEGMENT: tl.constexpr,
    ALIGN: tl.constexpr,
    PITCH: tl.constexpr,
):
    """Start copying a segment of SEGMENT bytes of each of the rows that begin at `starts` to shared memory."""
    c = lane % 4
    left = tl.minimum(ROW - segment * SEGMENT, SEGMENT)
    for r in tl.static_range(len(starts)):
        source = starts[r] + segment.to(tl.int64) * SEGMENT
        end = left
        if ALIGN < 16:
            before = (source & 15).to(tl.int32)
            source -= before
            end += tl.where(left > 0, before, 0)
        to = buffer + (r * 8 + lane % 32 // 4) * PITCH
        for k in tl.static_range((SEGMENT + 16 - ALIGN + 63) // 64):
            copy16(to + (c * 16 + k * 64), source + (c * 16 + k * 64), c * 16 + k * 64, end)
    close_group(lane)


@triton.jit
def staged_at(starts, segment, buffer, lane, SEGMENT: tl.constexpr, ALIGN: tl.constexpr, PITCH: tl.constexpr):
    """Where `copy_segment` has put the segment of each row."""
    at = ()
    for r in tl.static_range(len(starts)):
        to = buffer + (r * 8 + lane % 32 // 4) * PITCH
        if ALIGN < 16:
            to += ((starts[r] + segment.to(tl.int64) * SEGMENT) & 15).to(tl.int32)
        at += (to,)
    return at


@triton.jit(do_not_specialize=["n_rows", "m"])
def tiles(
    src,
    x,
    bias,
    out,
    n_rows,
    m,
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSETS: tl.constexpr,
    UPS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ZERO: tl.constexpr,
    BYTES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    SEGMENT: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    PITCH: tl.constexpr,
    DECLARE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """out[m, n_rows] = x[m, BLOCKS * ELEMENTS] src^T + bias, for m <= 8.

    A program makes 16 TILES columns of `out`; its warps take segments of SEGMENT blocks of these rows of the weight in
    turn. What a row has not is taken with zeros for x and scale; rows past the end repeat the last one and are not
    stored.
    """
    ALL: tl.constexpr = BLOCKS % (WARPS * SEGMENT) == 0
    STEPS: tl.constexpr = (BLOCKS + WARPS * SEGMENT - 1) // (WARPS * SEGMENT)
    STAGE: tl.constexpr = TILES * 16 * PITCH
    lane = tl.arange(0, WARPS * 32)
    warp = lane // 32
    g = lane % 32 // 4
    magic = n_rows >> 31  # see bits.py [Note: Magic]
    first = tl.program_id(0) * (16 * TILES)
    zeros = ()
    if ZERO > 0:
        zeros += (minus_zeros(ZERO, lane, m),)
        if UPS[len(UPS) - 1] == 4:
            zeros += (minus_zeros(ZERO * 16, lane, m),)
    starts = ()
    totals = ()
    nothing = tl.full(lane.shape, 0.0, tl.float32)
    for r in tl.static_range(2 * TILES):
        row = tl.minimum(first + r * 8 + g, n_rows - 1)
        starts += ((src + row.to(tl.int64) * (BLOCKS * BYTES)).to(tl.int64),)
    for _ in tl.static_range(TILES):
        totals += ((nothing, nothing, nothing, nothing),)
    x += tl.minimum(g, m - 1) * (BLOCKS * ELEMENTS) + lane % 4 * WIDTH
    if not EMULATE:
        buffer = reserve(lane, DECLARE) + warp * (STAGES * STAGE)
        for s in tl.static_range(STAGES - 1):
            segment = s * WARPS + warp
            copy_segment(starts, segment, buffer + s * STAGE, lane, BLOCKS * BYTES, SEGMENT * BYTES, ALIGN, PITCH)
    for i in range(0, STEPS):
        segment = i * WARPS + warp
        if not EMULATE:
            sync_warp(lane)
            to = buffer + (i + STAGES - 1) % STAGES * STAGE
            later = segment + (STAGES - 1) * WARPS
            copy_segment(starts, later, to, lane, BLOCKS * BYTES, SEGMENT * BYTES, ALIGN, PITCH)
        raw = ()
        for b in tl.static_range(SEGMENT):
            block = segment * SEGMENT + b
            for u in tl.static_range(len(OFFSETS)):
                raw += (load_runs(x + block * ELEMENTS, block < BLOCKS, OFFSETS, u, WIDTH, ALL),)
        if not EMULATE:
            wait_for_all_but(lane, STAGES - 1)
            staged = staged_at(starts, segment, buffer + i % STAGES * STAGE, lane, SEGMENT * BYTES, ALIGN, PITCH)
        for b in tl.static_range(SEGMENT):
            block = segment * SEGMENT + b
            xs = ()
            for u in tl.static_range(len(OFFSETS)):
                xs += raw[b * len(OFFSETS) + u]
            if EMULATE:
                at = ()
                for r in tl.static_range(2 * TILES):
                    place = starts[r] + tl.minimum(block, BLOCKS - 1).to(tl.int64) * BYTES
                    at += (place.to(tl.pointer_type(tl.uint8), bitcast=True),)
                totals = add_block(
                    totals, at, xs, lane, block < BLOCKS, magic, zeros, HEAD, UNIT, UPS, GROUPS, 0, 1, ALL, WARPS, True
                )
            else:
                totals = add_block(
                    totals,
                    staged,
                    xs,
                    lane,
                    block < BLOCKS,
                    magic,
                    zeros,
                    HEAD,
                    UNIT,
                    UPS,
                    GROUPS,
                    b * BYTES,
                    ALIGN,
                    ALL,
                    WARPS,
                    False,
                )
    quad = tl.arange(0, 32)[:, None]
    element = tl.arange(0, 4)[None, :]
    columns = quad % 4 * 2 + element % 2
    for t in tl.static_range(TILES):
        y = tl.join(tl.join(totals[t][0], totals[t][2]), tl.join(totals[t][1], totals[t][3]))
        y = tl.reduce(tl.reshape(y, (WARPS, 32, 4)), 0, add) * UNSCALE
        rows = first + t * 16 + element // 2 * 8 + quad // 4
        if bias is not None:
            y += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
        tl.store(out + columns * n_rows + rows, y.to(out.dtype.element_ty), mask=(rows < n_rows) & (columns < m))
