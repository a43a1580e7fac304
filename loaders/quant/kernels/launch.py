"""Dequantise a tensor with the Triton kernel of its type: the same name and meaning as in reference.py.

The input is the raw bytes of the file wherever they lie, at any address; nothing is repacked. Importing this module
needs Triton, so that only dispatch imports it, when a tensor on a GPU asks for it.

[Note: Variants]
A kernel compiles once for each type, output type and alignment, 0.1 to 0.5 s each, and Triton keeps the result on
disk. Finding a compiled kernel again costs Triton more time than a small tensor takes to dequantise, so the compiled
kernels are kept here, by what they were compiled for, and called directly. Their number is bounded by the types (23),
the output types (3), the alignments (8) and the devices; a model uses a handful. A configuration is a line of the
table below, measured by benchmarks/dequant.py; there is no autotuning at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch

from ...gguf.types import BLOCKS, GGMLType
from . import blocks32, iq, kquants, ternary
from .grids import TABLES, table


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, at no cost
class Kernel:
    """A Triton kernel and how to launch it: lanes that share a block, lanes and warps of a program."""

    fn: Any
    per_block: int
    lanes: int = 128
    warps: int = 4


KERNELS: dict[GGMLType, Kernel] = {
    GGMLType.Q4_0: Kernel(blocks32.q4_0, 2),
    GGMLType.Q4_1: Kernel(blocks32.q4_1, 2),
    GGMLType.Q5_0: Kernel(blocks32.q5_0, 2),
    GGMLType.Q5_1: Kernel(blocks32.q5_1, 2),
    GGMLType.Q8_0: Kernel(blocks32.q8_0, 2),
    GGMLType.IQ4_NL: Kernel(blocks32.iq4_nl, 2),
    GGMLType.MXFP4: Kernel(blocks32.mxfp4, 2),
    GGMLType.NVFP4: Kernel(blocks32.nvfp4, 4),
    GGMLType.Q2_K: Kernel(kquants.q2_k, 8),
    GGMLType.Q3_K: Kernel(kquants.q3_k, 8),
    GGMLType.Q4_K: Kernel(kquants.q4_k, 8),
    GGMLType.Q5_K: Kernel(kquants.q5_k, 8),
    GGMLType.Q6_K: Kernel(kquants.q6_k, 8),
    GGMLType.TQ1_0: Kernel(ternary.tq1_0, 8),
    GGMLType.TQ2_0: Kernel(ternary.tq2_0, 8),
    GGMLType.IQ1_S: Kernel(iq.iq1_s, 16),
    GGMLType.IQ1_M: Kernel(iq.iq1_m, 16),
    GGMLType.IQ2_XXS: Kernel(iq.iq2_xxs, 16),
    GGMLType.IQ2_XS: Kernel(iq.iq2_xs, 16),
    GGMLType.IQ2_S: Kernel(iq.iq2_s, 16),
    GGMLType.IQ3_XXS: Kernel(iq.iq3_xxs, 16),
    GGMLType.IQ3_S: Kernel(iq.iq3_s, 16),
    GGMLType.IQ4_XS: Kernel(iq.iq4_xs, 8),
}

_compiled: dict[tuple, tuple] = {}  # variant -> compiled kernel, its arguments after the block count. [Note: Variants]


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
    layout = BLOCKS[ggml_type]
    data = data.contiguous()
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=data.device)
    blocks = data.numel() // layout.nbytes
    if blocks * layout.nbytes != data.numel() or blocks * layout.elements != out.numel() or not out.is_contiguous():
        raise ValueError(
            f"{data.numel()} bytes are not a {ggml_type.name} tensor of shape {tuple(out.shape)}: its {out.numel()} "
            f"elements take {out.numel() / layout.elements:g} blocks of {layout.nbytes} bytes, in a contiguous tensor."
        )
    if blocks:
        launch(KERNELS[ggml_type], ggml_type, data, out, blocks)
    return out


def launch(kernel: Kernel, ggml_type: GGMLType, data: torch.Tensor, out: torch.Tensor, blocks: int) -> None:
    """Run `kernel` over the `blocks` of `data`, on its device and that device's current stream."""
    device = data.device
    per_program = kernel.lanes // kernel.per_block
    grid = ((blocks + per_program - 1) // per_program, 1, 1)
    source = alignment(data.data_ptr())
    variant = (kernel, out.dtype, source, out.data_ptr() % 16 == 0, device)
    # Triton launches on torch's current device, whichever device its arguments lie on.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        if variant in _compiled:
            compiled, rest = _compiled[variant]
            compiled[grid](data, out, blocks, *rest)
            return
        tables = (table(ggml_type, device),) if ggml_type in TABLES else ()
        rest = (*tables, gcd(BLOCKS[ggml_type].nbytes, source, 8), kernel.lanes)
        compiled = kernel.fn[grid](data, out, blocks, *rest, num_warps=kernel.warps)
        if compiled is not None:  # Triton's interpreter compiles nothing
            _compiled[variant] = compiled, rest
