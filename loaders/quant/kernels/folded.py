"""Dequantise a weight and add the product of two thin matrices to it, before the one rounding.

What a LoRA adds is added where the weight is made: the sum never leaves the registers, so no byte of the dense weight
is moved twice. Making a weight is bound by writing it, and the tensor cores work meanwhile.

A program keeps its columns of the one factor in shared memory and walks down the rows, reading 64 rows of the other
at a time. Which elements of a block a lane makes is the decoder's business (programs.py, [Note: Decoders]), so the
product is made in the same order.

[Note: Fragments]
Tensor cores leave a product of 16-bit matrices spread over the threads in one fixed way: of every 16 rows and 8
columns, thread 4 r + q of a warp has columns 2 q and 2 q + 1 of rows r and r + 8. Decoders want eight neighbouring
columns of one row in a thread. So the columns of the factor are put in another order before they are multiplied: what
comes out as columns 8 j + 2 q + i of a run of 32 (j = 0..3, i = 0, 1) are its columns 8 q + 2 j + i, and the lanes of
the decoder are numbered as the threads are. With rows 16 w + 8 h + r and runs m:

    product [rows, columns]    w h r, m j q i
    lanes [lanes, 8]           m h w r q, j i

Where a warp has other rows than 16 w to 16 w + 15 (before Hopper), Triton moves the sums through shared memory, which
changes the time and nothing else.
"""

# ruff: noqa: N803  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import gcd

import torch
import triton
import triton.language as tl

from ...gguf.types import BLOCKS, GGMLType
from . import kept, ternary
from .failures import MismatchError
from .launch import KERNELS, alignment, checked_blocks, decoder
from .programs import product

Product = tuple[slice, torch.Tensor, torch.Tensor]  # rows, a [R, columns], b [rows, R]

MAX_RANK = 128  # above it, cuBLAS after the weight was made
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Cut:
    """How the work is divided; measured by benchmarks/lora_step.py.

    Attributes:
        rows: of a tile, a multiple of 16.
        lanes: of a row, a multiple of 4; each makes 8 columns or a multiple of that.
        warps: of a program, 16 rows each.
        registers: of a thread at most, so that as many programs as possible share a processor.
        programs: for each processor of the GPU.
    """

    rows: int = 64
    lanes: int = 8
    warps: int = 4
    registers: int | None = 128
    programs: int = 4


CUT = Cut()


@triton.jit
def by_lanes(total, ROWS: tl.constexpr, ACROSS: tl.constexpr):
    """A product [ROWS, 8 ACROSS] as [lanes, 8]. [Note: Fragments]"""
    parts = tl.reshape(total, (ROWS // 16, 2, 8, ACROSS // 4, 4, 4, 2))  # w h r m j q i
    return tl.reshape(tl.permute(parts, (3, 1, 0, 2, 5, 4, 6)), (ROWS * ACROSS, 8))


@triton.jit(do_not_specialize=["n_rows", "row_groups", "rank", "step"])
def program(
    src,
    a,
    b,
    out,
    n_rows,
    row_groups,
    rank,
    step,
    table,
    CHUNKS: tl.constexpr,
    DECODE: tl.constexpr,
    BYTES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """out[n_rows, columns] = dequantised src + b[n_rows, rank] a[rank, columns]; columns = row_groups GROUP ELEMENTS.

    A program makes every `step`-th tile of ROWS rows of its 8 ACROSS (or a multiple of that) columns. RANKS is at
    least rank, which MULTIPLE divides. Rows past the end repeat the last one, which they store once more.
    """
    group = tl.program_id(0) % row_groups
    row_blocks = row_groups * ACROSS // PER_BLOCK
    columns = row_blocks * ELEMENTS
    magic = 0x4B000000 + (n_rows >> 31)
    rank = rank // MULTIPLE * MULTIPLE  # which tells the compiler how its rows are aligned

    spread = tl.arange(0, ACROSS * 8)
    across = group * ACROSS + spread // 8
    column, offsets, _ = CHUNKS(across % PER_BLOCK, PER_BLOCK)
    column += across // PER_BLOCK * ELEMENTS + spread % 8
    ranks = tl.arange(0, RANKS)
    a_tiles = ()
    for k in tl.static_range(len(offsets)):
        a_at = a + ranks[:, None] * columns + (column + offsets[k])[None, :]
        a_tile = tl.load(a_at, mask=(ranks < rank)[:, None], other=0.0)
        fragments = tl.permute(tl.reshape(a_tile, (RANKS, ACROSS // 4, 4, 4, 2)), (0, 1, 3, 2, 4))  # m q j i: m j q i
        a_tiles += (tl.reshape(fragments, (RANKS, ACROSS * 8)),)  # type: ignore[assignment]

    lane = tl.arange(0, ROWS * ACROSS)  # m h w r q: [Note: Fragments]
    inside = group * ACROSS + lane // (4 * ROWS) * 4 + lane % 4
    own_row = lane // 32 % (ROWS // 16) * 16 + lane // (2 * ROWS) % 2 * 8 + lane // 4 % 8
    own_block = inside // PER_BLOCK
    inside %= PER_BLOCK
    at, _, _own = CHUNKS(inside, PER_BLOCK)
    for tile in range(tl.program_id(0) // row_groups, (n_rows + ROWS - 1) // ROWS, step):
        first = tile * ROWS
        b_row = tl.minimum(tl.arange(0, ROWS), n_rows - 1 - first)
        b_at = b + first.to(tl.int64) * rank + b_row[:, None] * rank + ranks[None, :]
        b_tile = tl.load(b_at, mask=(ranks < rank)[None, :], other=0.0)
        before = first.to(tl.int64) * row_blocks
        block = tl.minimum(own_row, n_rows - 1 - first) * row_blocks + own_block
        blocks = src + before * BYTES + block * BYTES
        q, scale, d, minimum, minus = DECODE(blocks, inside, magic, table, ALIGN, PER_BLOCK)
        to = out + before * ELEMENTS + (block * ELEMENTS + at)
        for k in tl.static_range(len(q)):
            y = q[k] * product(scale, d, k)[:, None]
            if len(minus) > 0:
                y = y + product(minimum, minus, k)[:, None]
            y += by_lanes(tl.dot(b_tile, a_tiles[k]), ROWS, ACROSS)
            chunk = (to + offsets[k])[:, None] + tl.arange(0, 8)[None, :]
            tl.store(chunk, y.to(out.dtype.element_ty))


def fits(ggml_type: GGMLType, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether `dequantize` takes such a weight; of a rank above MAX_RANK it should not."""
    kernel = KERNELS[ggml_type]
    if dtype not in DTYPES or len(shape) != 2 or kernel.chunks is ternary.digits:
        return False
    elements = BLOCKS[ggml_type].elements
    return shape[1] % elements == 0 and shape[1] // elements * kernel.per_block % CUT.lanes == 0


def dequantize(
    data: torch.Tensor,
    ggml_type: GGMLType,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    cut: Cut = CUT,
) -> torch.Tensor:
    """Fill `out` [N, K] with the weight that `data` encodes plus `b` [N, R] `a` [R, K], rounded once.

    Args:
        data: uint8, the blocks of a weight that `fits`.
        a: contiguous, in the dtype of `out`; `b` likewise.
        cut: another configuration, to measure it.

    Raises:
        MismatchError: shapes that do not fit each other or the bytes.
    """
    call = _call(data.contiguous(), ggml_type, a, b, out, cut)
    if call is not None:
        kept.start(call.variant, program, call.programs, call.args, call.constants, cut.warps, **call.options)
    return out


@dataclass(frozen=True)
class _Call:
    """One launch: what `kept.start` takes."""

    variant: tuple
    programs: int
    args: tuple  # data, a, b, out and numbers
    constants: Callable[[], tuple]
    options: dict[str, int]

    def bound(self, out: torch.Tensor, index: int) -> Callable[[int], None] | None:
        """The launch as a call with the address of a tensor like `out`, or None."""
        run = kept.bound(self.variant, self.programs, index)
        if run is None:
            return None
        tensors, numbers = self.args[:4], self.args[4:]
        src, a, b, to = (tensor.data_ptr() for tensor in tensors)
        offset = to - out.data_ptr()
        return lambda start: run(src, a, b, start + offset, *numbers)


def _call(
    data: torch.Tensor,
    ggml_type: GGMLType,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    cut: Cut,
    device: torch.device | None = None,
) -> _Call | None:
    """None where there is nothing to do. `device` is where it will run, if the tensors are on the meta device."""
    device = device or data.device
    kernel = KERNELS[ggml_type]
    n, k = out.shape
    blocks = checked_blocks(data, ggml_type, out.shape)
    rank = a.shape[0]
    if a.shape != (rank, k) or b.shape != (n, rank) or not fits(ggml_type, out.shape, out.dtype):
        raise MismatchError(f"factors {tuple(b.shape)} and {tuple(a.shape)} do not fit a weight {tuple(out.shape)}.")
    if not blocks:
        return None
    ranks = max(16, triton.next_power_of_2(rank))
    multiple = gcd(rank, 16)
    addresses = tuple(gcd(t.data_ptr(), 16) == 16 for t in (a, b, out))
    variant = (program, kernel, out.dtype, alignment(data.data_ptr()), addresses, ranks, multiple, cut, device)

    def constants() -> tuple:
        return (*decoder(kernel, ggml_type, data, kernel.per_block, device), cut.lanes, cut.rows, ranks, multiple)

    row_groups = blocks // n * kernel.per_block // cut.lanes
    tiles = -(-n // cut.rows)
    step = _step(tiles, max(1, cut.programs * _processors(device) // row_groups))
    options = {"maxnreg": cut.registers} if cut.registers and torch.version.cuda else {}
    return _Call(variant, step * row_groups, (data, a, b, out, n, row_groups, rank, step), constants, options)


def _step(tiles: int, programs: int) -> int:
    """How many programs share `tiles`, at most `programs`, so that all have the same to do as nearly as possible."""
    each = -(-tiles // programs)
    return -(-tiles // each)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _parts(
    data: torch.Tensor,
    ggml_type: GGMLType,
    products: Sequence[Product],
    out: torch.Tensor,
    device: torch.device | None = None,
) -> list[_Call]:
    """The launches that fill `out`, whose products (rows, a, b) do not overlap; `device` as `_call` takes it."""
    by_row = data.contiguous().view(out.shape[0], -1)
    _, any_a, any_b = products[0]
    found, done = [], 0
    end = (slice(out.shape[0], out.shape[0]), any_a[:0], any_b[:0])
    for rows, a, b in [*sorted(products, key=lambda product: product[0].start), end]:
        if done < rows.start:  # nothing is added to these
            none = any_b.new_empty(rows.start - done, 0)
            between = slice(done, rows.start)
            found.append(_call(by_row[between], ggml_type, any_a[:0], none, out[between], CUT, device))
        if rows.start < rows.stop:
            found.append(_call(by_row[rows], ggml_type, a, b, out[rows], CUT, device))
        done = rows.stop
    return [call for call in found if call is not None]


def dequantize_rows(
    data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], products: Sequence[Product]
) -> torch.Tensor:
    """A weight of `shape` with the products (rows, a, b) added to their rows, which do not overlap."""
    out = torch.empty(shape, dtype=products[0][1].dtype, device=data.device)
    for call in _parts(data, ggml_type, products, out):
        kept.start(call.variant, program, call.programs, call.args, call.constants, CUT.warps, **call.options)
    return out


def stand_ins(
    ggml_type: GGMLType, shape: Sequence[int], dtype: torch.dtype, parts: Sequence[tuple[slice, int]]
) -> tuple[torch.Tensor, list[Product]]:
    """Bytes of a weight and products of (rows, rank) without memory, which seem to lie as an allocator places them."""
    layout, (n, k) = BLOCKS[ggml_type], shape
    data = torch.empty(n * k // layout.elements * layout.nbytes, dtype=torch.uint8, device="meta")
    empty = partial(torch.empty, dtype=dtype, device="meta")
    return data, [(rows, empty(rank, k), empty(rows.stop - rows.start, rank)) for rows, rank in parts]


def compile_ahead(
    ggml_type: GGMLType,
    shape: Sequence[int],
    dtype: torch.dtype,
    parts: Sequence[tuple[slice, int]],
    device: torch.device,
) -> None:
    """Compile what `dequantize_rows` will start on a CUDA `device` for products of such (rows, rank).

    Args:
        shape: of a weight that `fits`.
    """
    data, products = stand_ins(ggml_type, shape, dtype, parts)
    for call in _parts(data, ggml_type, products, torch.empty(shape, dtype=dtype, device="meta"), device):
        kept.compile_ahead(call.variant, program, call.args, call.constants, CUT.warps, device, **call.options)


def bind(
    data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], products: Sequence[Product]
) -> Callable[[], torch.Tensor] | None:
    """`dequantize_rows` with these arguments as a call without any, a fraction of the cost for the host, or None.

    It knows the addresses of `data` and of the factors and keeps none of them alive: who calls it has to hold them.
    """
    shape, device, dtype = tuple(shape), data.device, products[0][1].dtype
    first = dequantize_rows(data, ggml_type, shape, products)  # compiles, and complains
    if device.type != "cuda" or first.data_ptr() % 16 or not data.is_contiguous():
        return None
    calls, index = _parts(data, ggml_type, products, first), device.index
    launches = [launch for call in calls if (launch := call.bound(first, index)) is not None]
    if len(launches) < len(calls):
        return None
    strides, current_device = first.stride(), torch._C._cuda_getDevice

    def bound() -> torch.Tensor:
        if current_device() != index:
            with torch.cuda.device(index):
                return bound()
        out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        start = out.data_ptr()
        for launch in launches:
            launch(start)
        return out

    return bound if kept.proves(tuple(call.variant for call in calls), bound, first) else None
