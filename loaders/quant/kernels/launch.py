"""Dequantise a tensor, or multiply by it, with the Triton programs and its type's decoder: as in reference.py.

The input is the raw bytes of the file wherever they lie, at any address; nothing is repacked. Importing this module
needs Triton, so that only dispatch imports it, when a tensor on a GPU asks for it. A configuration is a line of the
table below, measured by benchmarks/dequant.py and benchmarks/skinny.py; there is no autotuning at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch

from ...gguf.types import BLOCKS, GGMLType
from . import blocks32, iq, kept, kquants, programs, ternary
from .bits import chunks_16
from .grids import TABLES, table


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, at no cost
class Kernel:
    """How a type is decoded, and the configurations of the two programs, measured on an H200.

    Attributes:
        decode, chunks: what programs.py calls, see [Note: Decoders] there.
        per_block, lanes, warps: to dequantise: lanes that share a block, lanes and warps of a program.
        skinny_per_block, skinny_rows, skinny_lanes: to multiply: lanes that share a block, rows of the weight for a
            program, and lanes for each of these rows, one to a thread.
        few: rows of x up to which to multiply is faster than to dequantise and call cuBLAS.
    """

    decode: Any
    chunks: Any
    per_block: int
    skinny_per_block: int
    skinny_lanes: int = 32
    skinny_rows: int = 4
    few: int = 4
    lanes: int = 128
    warps: int = 4


KERNELS: dict[GGMLType, Kernel] = {
    GGMLType.Q4_0: Kernel(blocks32.q4_0, chunks_16, 2, 2, skinny_lanes=64, few=8),
    GGMLType.Q4_1: Kernel(blocks32.q4_1, chunks_16, 2, 2, skinny_lanes=64),
    GGMLType.Q5_0: Kernel(blocks32.q5_0, chunks_16, 2, 2, skinny_lanes=64),
    GGMLType.Q5_1: Kernel(blocks32.q5_1, chunks_16, 2, 2, skinny_lanes=64),
    GGMLType.Q8_0: Kernel(blocks32.q8_0, chunks_16, 2, 2, skinny_lanes=64, few=8),
    GGMLType.IQ4_NL: Kernel(blocks32.iq4_nl, chunks_16, 2, 2, skinny_lanes=64),
    GGMLType.MXFP4: Kernel(blocks32.mxfp4, chunks_16, 2, 2, skinny_lanes=64),
    GGMLType.NVFP4: Kernel(blocks32.nvfp4, blocks32.nvfp4_chunks, 4, 4),
    GGMLType.Q2_K: Kernel(kquants.q2_k, kquants.chunks_32, 16, 8),
    GGMLType.Q3_K: Kernel(kquants.q3_k, kquants.chunks_64, 16, 8, lanes=256),
    GGMLType.Q4_K: Kernel(kquants.q4_k, kquants.chunks_32, 16, 8),
    GGMLType.Q5_K: Kernel(kquants.q5_k, kquants.chunks_32, 16, 8),
    GGMLType.Q6_K: Kernel(kquants.q6_k, kquants.chunks_64, 16, 8, few=8),
    GGMLType.TQ1_0: Kernel(ternary.tq1_0, ternary.digits, 8, 8),
    GGMLType.TQ2_0: Kernel(ternary.tq2_0, kquants.chunks_32, 16, 8),
    GGMLType.IQ1_S: Kernel(iq.iq1_s, chunks_16, 16, 16),
    GGMLType.IQ1_M: Kernel(iq.iq1_m, chunks_16, 16, 16),
    GGMLType.IQ2_XXS: Kernel(iq.iq2_xxs, chunks_16, 16, 16),
    GGMLType.IQ2_XS: Kernel(iq.iq2_xs, chunks_16, 16, 16),
    GGMLType.IQ2_S: Kernel(iq.iq2_s, chunks_16, 16, 16),
    GGMLType.IQ3_XXS: Kernel(iq.iq3_xxs, chunks_16, 16, 16),
    GGMLType.IQ3_S: Kernel(iq.iq3_s, chunks_16, 16, 16),
    GGMLType.IQ4_XS: Kernel(iq.iq4_xs, chunks_16, 16, 16),
}

SKINNY_ROWS = 8  # rows of x that `linear` takes; `Kernel.few` says up to how many it is worth it
MANY_ROWS = 6144  # rows of a weight from which on programs that make more of them still fill a GPU


def alignment(address: int) -> int:
    """What the kernels are told of an address: that it is a multiple of 16, of 4, of 2, or nothing.

    16 is what Triton itself takes note of. It would split a load that is wider than what it can prove aligned, and
    pass it through shared memory; so nothing is made of a multiple of 8.
    """
    return 16 if address % 16 == 0 else gcd(address, 4)


def dequantize(
    data: torch.Tensor,
    ggml_type: GGMLType,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make a tensor of `shape` and `dtype` from the bytes of one in `ggml_type`, or fill `out` with it.

    Args:
        data: uint8 of any shape, read only; its blocks are taken in memory order.
        out: contiguous, of `shape` and `dtype`, on the device of `data`.

    Raises:
        ValueError: the bytes are not those of `shape`.
    """
    data = data.contiguous()
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=data.device)
    blocks = checked_blocks(data, ggml_type, out.shape)
    if not out.is_contiguous():
        raise ValueError(f"a {ggml_type.name} tensor is dequantised into a contiguous tensor; strides {out.stride()}.")
    if blocks:
        run_dequantize(KERNELS[ggml_type], ggml_type, data, out, blocks)
    return out


def checked_blocks(data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int]) -> int:
    """How many blocks `data` has; ValueError unless they are those of `shape`."""
    layout = BLOCKS[ggml_type]
    blocks = data.numel() // layout.nbytes
    elements = prod(shape)
    if blocks * layout.nbytes != data.numel() or blocks * layout.elements != elements:
        raise ValueError(
            f"{data.numel()} bytes are not a {ggml_type.name} tensor of shape {tuple(shape)}: its {elements} elements "
            f"take {elements / layout.elements:g} blocks of {layout.nbytes} bytes."
        )
    return blocks


def run_dequantize(kernel: Kernel, ggml_type: GGMLType, data: torch.Tensor, out: torch.Tensor, blocks: int) -> None:
    """Fill `out` from the `blocks` of `data` by `kernel`."""
    source = alignment(data.data_ptr())
    variant = (kernel, out.dtype, source, out.data_ptr() % 16 == 0, data.device)

    def constants() -> tuple:
        return (*decoder(kernel, ggml_type, data, kernel.per_block), kernel.lanes)

    kept.start(variant, programs.dequantize, grid(kernel, blocks), (data, out, blocks), constants, kernel.warps)


def grid(kernel: Kernel, blocks: int) -> int:
    """How many programs dequantise that many blocks."""
    return -(-blocks * kernel.per_block // kernel.lanes)


def decoder(kernel: Kernel, ggml_type: GGMLType, data: torch.Tensor, per_block: int) -> tuple:
    """The arguments of both programs from `table` to `ALIGN`."""
    layout = BLOCKS[ggml_type]
    values = table(ggml_type, data.device) if ggml_type in TABLES else None
    align = gcd(layout.nbytes, alignment(data.data_ptr()))
    return values, kernel.chunks, kernel.decode, layout.nbytes, layout.elements, per_block, align


def bind(
    data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """`dequantize` with these arguments as a call without any, which costs the host less than half as much.

    It holds `data` and its address: bind again when the bytes have moved.
    """
    data = data.contiguous()
    shape = tuple(shape)
    device = data.device
    first = dequantize(data, ggml_type, shape, dtype)  # compiles, and complains

    def slow() -> torch.Tensor:
        return dequantize(data, ggml_type, shape, dtype)

    if device.type != "cuda" or first.data_ptr() % 16:
        return slow
    kernel, source, index = KERNELS[ggml_type], data.data_ptr(), device.index
    blocks = data.numel() // BLOCKS[ggml_type].nbytes
    run = kept.bound((kernel, dtype, alignment(source), True, device), grid(kernel, blocks), index)
    if run is None:
        return slow
    strides, current_device = first.stride(), torch._C._cuda_getDevice

    def fast() -> torch.Tensor:
        if current_device() != index:
            return slow()
        out = torch.empty_strided(shape, strides, dtype=dtype, device=device)  # costs half of what `empty` does
        run(source, out.data_ptr(), blocks)
        return out

    return fast


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    ggml_type: GGMLType,
    shape: Sequence[int],
    bias: torch.Tensor | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """`x W^T + bias` for at most SKINNY_ROWS rows of `x`, reading the quantised bytes of W once and nothing else of it.

    Products are summed in float32 and the result is rounded once, so that it is nearer to the exact product than what
    a weight dequantised to bfloat16 or float16 gives.

    Args:
        x: [..., columns] in float32, float16 or bfloat16; the result is [..., rows] in the same.
        data: the bytes of W; `shape` its (rows, columns).
        bias: [rows], of any floating point type.
        kernel: another configuration than the table's, to measure it.

    Raises:
        ValueError: shapes that do not fit each other or the bytes, or too many rows of `x`.
    """
    rows, columns = shape
    layout = BLOCKS[ggml_type]
    blocks = checked_blocks(data, ggml_type, shape)
    m = x.numel() // columns if columns else 0
    if x.shape[-1] != columns or columns % layout.elements or (bias is not None and bias.shape != (rows,)):
        raise ValueError(
            f"a {ggml_type.name} weight of shape {tuple(shape)} (rows of whole blocks of {layout.elements}) cannot "
            f"multiply x of shape {tuple(x.shape)}{'' if bias is None else f' with bias {tuple(bias.shape)}'}."
        )
    if m > SKINNY_ROWS:
        raise ValueError(f"{m} rows of x: above {SKINNY_ROWS}, dequantise the weight and multiply by that.")
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    data, x, kernel = data.contiguous(), x.contiguous(), kernel or KERNELS[ggml_type]
    bias = None if bias is None else bias.contiguous()
    per_program = kernel.skinny_rows if rows >= MANY_ROWS else max(1, kernel.skinny_rows // 2)
    variant = (
        *(programs.skinny, kernel, per_program, columns, m, data.device, x.dtype),
        *(alignment(data.data_ptr()), x.data_ptr() % 16 == 0, out.data_ptr() % 16 == 0),
        *((bias.dtype, bias.data_ptr() % 16 == 0) if bias is not None else ()),
    )

    def constants() -> tuple:
        padded = 1 << (m - 1).bit_length()
        head = decoder(kernel, ggml_type, data, kernel.skinny_per_block)
        return (*head, blocks // rows, padded, per_program, kernel.skinny_lanes)

    args = (data, x, bias, out, rows, m)
    kept.start(variant, programs.skinny, -(-rows // per_program), args, constants, kernel.skinny_lanes // 32)
    return out
