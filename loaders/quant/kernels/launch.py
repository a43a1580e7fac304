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
from . import blocks32, dependent, iq, kept, kquants, programs, ternary
from .bits import chunks_16
from .failures import MismatchError
from .grids import TABLES, table


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, at no cost
class Kernel:
    """How a type is decoded, and the configurations of the two programs, measured on an H200.

    Attributes:
        decode, chunks: what programs.py calls, see [Note: Decoders] there.
        per_block: to dequantise: lanes that share a block.
        large, small: to dequantise tensors of more than SMALL elements, and others: lanes and warps of a program.
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
    large: tuple[int, int] = (64, 1)
    small: tuple[int, int] = (64, 1)

    def cut(self, elements: int) -> tuple[int, int]:
        return self.small if elements <= SMALL else self.large


# Elements of a tensor of which few programs with much in flight make more than many that come and go: it is written
# before the first of the many would have been followed by another.
SMALL = 1 << 24

KERNELS: dict[GGMLType, Kernel] = {
    GGMLType.Q4_0: Kernel(blocks32.q4_0, chunks_16, 2, 2, skinny_lanes=64, few=8, small=(512, 4)),
    GGMLType.Q4_1: Kernel(blocks32.q4_1, chunks_16, 2, 2, skinny_lanes=64, small=(512, 4)),
    GGMLType.Q5_0: Kernel(blocks32.q5_0, chunks_16, 2, 2, skinny_lanes=64),
    GGMLType.Q5_1: Kernel(blocks32.q5_1, chunks_16, 2, 2, skinny_lanes=64, small=(512, 4)),
    GGMLType.Q8_0: Kernel(blocks32.q8_0, chunks_16, 2, 2, skinny_lanes=64, few=8, small=(512, 4)),
    GGMLType.IQ4_NL: Kernel(blocks32.iq4_nl, chunks_16, 2, 2, skinny_lanes=64),
    GGMLType.MXFP4: Kernel(blocks32.mxfp4, chunks_16, 2, 2, skinny_lanes=64, small=(512, 4)),
    GGMLType.NVFP4: Kernel(blocks32.nvfp4, blocks32.nvfp4_chunks, 4, 4, small=(512, 4)),
    GGMLType.Q2_K: Kernel(kquants.q2_k, kquants.chunks_32, 16, 8, large=(128, 4), small=(128, 2)),
    GGMLType.Q3_K: Kernel(kquants.q3_k, kquants.chunks_8, 8, 8, large=(32, 1), small=(64, 2)),
    GGMLType.Q4_K: Kernel(kquants.q4_k, kquants.chunks_32, 16, 8),
    GGMLType.Q5_K: Kernel(kquants.q5_k, kquants.chunks_32, 16, 8, small=(512, 4)),
    GGMLType.Q6_K: Kernel(kquants.q6_k, kquants.chunks_8, 8, 8, few=8, large=(32, 1), small=(256, 4)),
    GGMLType.TQ1_0: Kernel(ternary.tq1_0, ternary.digits, 8, 8, small=(256, 4)),
    GGMLType.TQ2_0: Kernel(ternary.tq2_0, kquants.chunks_32, 16, 8, large=(128, 4), small=(512, 4)),
    GGMLType.IQ1_S: Kernel(iq.iq1_s, chunks_16, 16, 16, large=(128, 4), small=(128, 4)),
    GGMLType.IQ1_M: Kernel(iq.iq1_m, chunks_16, 16, 16, large=(512, 4), small=(512, 4)),
    GGMLType.IQ2_XXS: Kernel(iq.iq2_xxs, chunks_16, 16, 16, large=(128, 4), small=(512, 4)),
    GGMLType.IQ2_XS: Kernel(iq.iq2_xs, chunks_16, 16, 16, large=(128, 2), small=(512, 4)),
    GGMLType.IQ2_S: Kernel(iq.iq2_s, chunks_16, 16, 16, large=(128, 2), small=(512, 4)),
    GGMLType.IQ3_XXS: Kernel(iq.iq3_xxs, chunks_16, 16, 16, large=(512, 4), small=(512, 4)),
    GGMLType.IQ3_S: Kernel(iq.iq3_s, chunks_16, 16, 16, large=(128, 4), small=(512, 4)),
    GGMLType.IQ4_XS: Kernel(iq.iq4_xs, chunks_16, 16, 16),
}


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
        MismatchError: the bytes are not those of `shape`.
    """
    data = data.contiguous()
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=data.device)
    blocks = checked_blocks(data, ggml_type, out.shape)
    if not out.is_contiguous():
        raise MismatchError(
            f"a {ggml_type.name} tensor is dequantised into a contiguous tensor; strides {out.stride()}."
        )
    if blocks:
        run_dequantize(KERNELS[ggml_type], ggml_type, data, out, blocks)
    return out


def checked_blocks(data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int]) -> int:
    """How many blocks `data` has; MismatchError unless they are those of `shape`."""
    layout = BLOCKS[ggml_type]
    blocks = data.numel() // layout.nbytes
    elements = prod(shape)
    if blocks * layout.nbytes != data.numel() or blocks * layout.elements != elements:
        raise MismatchError(
            f"{data.numel()} bytes are not a {ggml_type.name} tensor of shape {tuple(shape)}: its {elements} elements "
            f"take {elements / layout.elements:g} blocks of {layout.nbytes} bytes."
        )
    return blocks


def run_dequantize(kernel: Kernel, ggml_type: GGMLType, data: torch.Tensor, out: torch.Tensor, blocks: int) -> None:
    """Fill `out` from the `blocks` of `data` by `kernel`."""
    early = dependent.allowed(data.device)
    try:
        _start(kernel, ggml_type, data, out, blocks, early)
    except Exception as error:
        if not early or isinstance(error, torch.OutOfMemoryError):
            raise
        _start(kernel, ggml_type, data, out, blocks, early=False)  # raises where that is not what failed
        dependent.give_up(data.device, error)


def _start(
    kernel: Kernel, ggml_type: GGMLType, data: torch.Tensor, out: torch.Tensor, blocks: int, early: bool
) -> None:
    lanes, warps = kernel.cut(out.numel())

    def constants() -> tuple:
        return (*decoder(kernel, ggml_type, data, kernel.per_block), lanes, early)

    options = dependent.OPTIONS if early else {}
    of_these, args = variant(kernel, data, out, early), (data, out, blocks)
    kept.start(of_these, programs.dequantize, grid(kernel, lanes, blocks), args, constants, warps, **options)


def variant(kernel: Kernel, data: torch.Tensor, out: torch.Tensor, early: bool) -> tuple:
    """All that the program is compiled for, to fill `out` from `data`; `early`: see dependent.py."""
    lanes, _ = kernel.cut(out.numel())
    return kernel, lanes, out.dtype, alignment(data.data_ptr()), out.data_ptr() % 16 == 0, data.device, early


def grid(kernel: Kernel, lanes: int, blocks: int) -> int:
    """How many programs of that many lanes dequantise that many blocks."""
    return -(-blocks * kernel.per_block // lanes)


def decoder(
    kernel: Kernel, ggml_type: GGMLType, data: torch.Tensor, per_block: int, device: torch.device | None = None
) -> tuple:
    """The arguments of both programs from `table` to `ALIGN`."""
    layout = BLOCKS[ggml_type]
    values = table(ggml_type, device or data.device) if ggml_type in TABLES else None
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
    lanes, _ = kernel.cut(first.numel())
    of_these = variant(kernel, data, first, dependent.allowed(device))
    run = kept.bound(of_these, grid(kernel, lanes, blocks), index)
    if run is None:
        return slow
    strides, current_device = first.stride(), torch._C._cuda_getDevice

    def fast() -> torch.Tensor:
        if current_device() != index:
            return slow()
        out = torch.empty_strided(shape, strides, dtype=dtype, device=device)  # costs half of what `empty` does
        run(source, out.data_ptr(), blocks)
        return out

    with torch.cuda.device(index):  # else the slow way would prove itself
        return fast if kept.proves(of_these, fast, first) else slow
