"""Dequantise a weight and add the product of two thin matrices to it, before the one rounding.

What a LoRA adds is added where the weight is made: the sum never leaves the registers, so no byte of the dense weight
is moved twice. For all weights of FLUX.1 on an H200 that takes 8.5 ms beyond dequantising at rank 16 and 15 ms at rank
64, where cuBLAS takes 20 ms afterwards at any rank up to 128 (benchmarks/results/lora_step_h200.txt).

A program makes a tile of rows by the columns of GROUP neighbouring blocks. Which elements of a block a lane makes is
the decoder's business (programs.py, [Note: Decoders]), so the product is made in the same order: column 8 p + i of its
chunk k is element i of what lane p of a row makes of chunk k.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl

from ...gguf.types import BLOCKS, GGMLType
from . import kept, ternary
from .launch import KERNELS, alignment, checked_blocks, decoder
from .programs import product

ROWS, WARPS = 64, 4  # of a program, measured by benchmarks/lora_step.py
MAX_RANK = 112  # above it, cuBLAS is faster after the weight was made (measured at 64 and 128)
SPAN = 256  # columns of a program
RANKS = 64  # of the factors at a time
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["n_rows", "row_groups", "rank"])
def program(
    src,
    a,
    b,
    out,
    n_rows,
    row_groups,
    rank,
    table,
    CHUNKS: tl.constexpr,
    DECODE: tl.constexpr,
    BYTES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """out[n_rows, columns] = dequantised src + b[n_rows, rank] a[rank, columns]; columns = row_groups GROUP ELEMENTS.

    EVEN says that rank is a multiple of RANKS. Rows past the end repeat the last one, which they store once more.
    """
    ACROSS: tl.constexpr = PER_BLOCK * GROUP  # lanes of a row
    group = tl.program_id(0) % row_groups
    first = tl.program_id(0) // row_groups * ROWS
    columns = row_groups * (GROUP * ELEMENTS)
    lane = tl.arange(0, ROWS * ACROSS)
    row = tl.minimum(first + lane // ACROSS, n_rows - 1)
    inside = lane % ACROSS
    magic = 0x4B000000 + (n_rows >> 31)
    block = row.to(tl.int64) * (row_groups * GROUP) + group * GROUP + inside // PER_BLOCK
    at, offsets, _own = CHUNKS(inside % PER_BLOCK, PER_BLOCK)
    q, scale, d, minimum, minus = DECODE(src + block * BYTES, inside % PER_BLOCK, magic, table, ALIGN, PER_BLOCK)
    out += block * ELEMENTS + at

    spread = tl.arange(0, ACROSS * 8)
    across = spread // 8
    column, _, _ = CHUNKS(across % PER_BLOCK, PER_BLOCK)
    column += (group * GROUP + across // PER_BLOCK) * ELEMENTS + spread % 8
    b_row = tl.minimum(first + tl.arange(0, ROWS), n_rows - 1).to(tl.int64) * rank
    ranks = tl.arange(0, RANKS)
    for k in tl.static_range(len(q)):
        total = tl.full([ROWS, ACROSS * 8], 0.0, tl.float32)
        for r in range(0, rank, RANKS):
            b_at = b + b_row[:, None] + (r + ranks)[None, :]
            a_at = a + (r + ranks)[:, None] * columns + (column + offsets[k])[None, :]
            if EVEN:
                b_tile = tl.load(b_at)
                a_tile = tl.load(a_at)
            else:
                b_tile = tl.load(b_at, mask=(r + ranks < rank)[None, :], other=0.0)
                a_tile = tl.load(a_at, mask=(r + ranks < rank)[:, None], other=0.0)
            total = tl.dot(b_tile, a_tile, total)
        y = q[k] * product(scale, d, k)[:, None]
        if len(minus) > 0:
            y = y + product(minimum, minus, k)[:, None]
        y += tl.reshape(total, (ROWS * ACROSS, 8))
        chunk = (out + offsets[k])[:, None] + tl.arange(0, 8)[None, :]
        tl.store(chunk, y.to(out.dtype.element_ty))


def fits(ggml_type: GGMLType, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether `dequantize` takes such a weight; of a rank above MAX_RANK it should not."""
    kernel = KERNELS[ggml_type]
    return dtype in DTYPES and len(shape) == 2 and shape[1] % SPAN == 0 and kernel.chunks is not ternary.digits


def dequantize(
    data: torch.Tensor,
    ggml_type: GGMLType,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    rows: int = ROWS,
    warps: int = WARPS,
) -> torch.Tensor:
    """Fill `out` [N, K] with the weight that `data` encodes plus `b` [N, R] `a` [R, K], rounded once.

    Args:
        data: uint8, the blocks of a weight that `fits`.
        a: contiguous, in the dtype of `out`; `b` likewise.
        rows, warps: another configuration, to measure it.

    Raises:
        ValueError: shapes that do not fit each other or the bytes.
    """
    data, kernel, layout = data.contiguous(), KERNELS[ggml_type], BLOCKS[ggml_type]
    n, k = out.shape
    blocks = checked_blocks(data, ggml_type, out.shape)
    rank = a.shape[0]
    if a.shape != (rank, k) or b.shape != (n, rank) or not fits(ggml_type, out.shape, out.dtype):
        raise ValueError(f"factors {tuple(b.shape)} and {tuple(a.shape)} do not fit a weight {tuple(out.shape)}.")
    if not blocks:
        return out
    group = max(1, SPAN // layout.elements)
    ranks = RANKS if rank % RANKS == 0 or rank > RANKS else max(16, 1 << (rank - 1).bit_length())
    even = rank % ranks == 0
    addresses = tuple(gcd(t.data_ptr(), 16) == 16 for t in (a, b, out))
    variant = (program, kernel, out.dtype, alignment(data.data_ptr()), addresses, ranks, even, rows, warps, data.device)

    def constants() -> tuple:
        return (*decoder(kernel, ggml_type, data, kernel.per_block), group, rows, ranks, even)

    row_groups = blocks // n // group
    programs = -(-n // rows) * row_groups
    kept.start(variant, program, programs, (data, a, b, out, n, row_groups, rank), constants, warps)
    return out


def dequantize_rows(
    data: torch.Tensor,
    ggml_type: GGMLType,
    shape: Sequence[int],
    products: Sequence[tuple[slice, torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """A weight of `shape` with the products (rows, a, b) added to their rows, which do not overlap."""
    _, any_a, any_b = products[0]
    out = torch.empty(shape, dtype=any_a.dtype, device=data.device)
    by_row = data.view(shape[0], -1)
    done = 0
    end = (slice(shape[0], shape[0]), any_a[:0], any_b[:0])
    for rows, a, b in [*sorted(products, key=lambda p: p[0].start), end]:
        if done < rows.start:  # nothing is added to these
            none = any_b.new_empty(rows.start - done, 0)
            dequantize(by_row[done : rows.start], ggml_type, any_a[:0], none, out[done : rows.start])
        if rows.start < rows.stop:
            dequantize(by_row[rows], ggml_type, a, b, out[rows])
        done = rows.stop
    return out
