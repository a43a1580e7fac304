"""The kernel that dequantises Q8_0, with options that the pack's does not have: for dequantise_ahead.py.

programs.dequantize with q8_0 of blocks32.py, for blocks on even addresses. It gives the same bits.
"""

# ruff: noqa: N803  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant.kernels import kept, launch
from pack.loaders.quant.kernels.bits import f16, octet
from triton.language.extra.cuda import gdc_wait

CUDA = (
    torch.cuda.is_available()
)  # else the kernel runs in Triton's interpreter, for which few large programs are quicker


@triton.jit
def load_word(ptr, LOAD: tl.constexpr):
    return tl.load(ptr.to(tl.pointer_type(tl.uint32), bitcast=True), eviction_policy=LOAD).to(tl.uint64)


@triton.jit
def load_words(ptr, LOAD: tl.constexpr):
    past = (ptr.to(tl.uint64) & 3).to(tl.int32)
    first = ptr - past
    w0 = load_word(first, LOAD)
    w1 = load_word(first + 4, LOAD)
    w2 = load_word(first + 4 + ((past + 3) & 4), LOAD)
    shift = (past * 8).to(tl.uint64)
    return ((w1 << 32 | w0) >> shift).to(tl.int32), ((w2 << 32 | w1) >> shift).to(tl.int32)


@triton.jit
def one_piece(src, out, n_blocks, piece, LOAD: tl.constexpr, STORE: tl.constexpr, LANES: tl.constexpr):
    first = piece * (LANES // 2)
    lane = tl.arange(0, LANES)
    block = tl.minimum(lane // 2, n_blocks - 1 - first)
    src += first.to(tl.int64) * 34 + block * 34
    out += first.to(tl.int64) * 32 + block * 32 + lane % 2 * 8
    magic = 0x4B000000 + (n_blocks >> 31)
    scale = tl.load(src.to(tl.pointer_type(tl.uint16), bitcast=True), eviction_policy=LOAD)
    d = f16(scale.to(tl.int32))[:, None]
    a0, b0 = load_words(src + 2 + lane % 2 * 8, LOAD)
    a1, b1 = load_words(src + 18 + lane % 2 * 8, LOAD)
    y0 = octet(a0, b0, magic, 0, 8, MINUS=128, FLIP=128) * d
    y1 = octet(a1, b1, magic, 0, 8, MINUS=128, FLIP=128) * d
    chunk = out[:, None] + tl.arange(0, 8)[None, :]
    tl.store(chunk, y0.to(out.dtype.element_ty), eviction_policy=STORE)
    tl.store(chunk + 16, y1.to(out.dtype.element_ty), eviction_policy=STORE)


@triton.jit(do_not_specialize=["n_blocks"])
def dequantize(
    src,
    out,
    n_blocks,
    LOAD: tl.constexpr,
    STORE: tl.constexpr,
    BACKWARDS: tl.constexpr,
    RESIDENT: tl.constexpr,
    OVERLAP: tl.constexpr,
    LANES: tl.constexpr,
):
    pieces = tl.cdiv(n_blocks * 2, LANES)
    piece = tl.program_id(0)
    if RESIDENT:
        for p in range(piece, pieces, tl.num_programs(0)):
            one_piece(src, out, n_blocks, pieces - 1 - p if BACKWARDS else p, LOAD, STORE, LANES)
    else:
        one_piece(src, out, n_blocks, pieces - 1 - piece if BACKWARDS else piece, LOAD, STORE, LANES)
    if OVERLAP:  # what comes after this kernel may rely on all that came before it
        gdc_wait()


@dataclass(frozen=True)
class Form:
    """How the kernel is compiled and started. `load`, `store`: what the L2 cache is told; `cut`: lanes and warps, else
    the present ones; `resident`: programs for each SM that take pieces in turn, else one for each piece."""

    load: str = ""
    store: str = ""
    backwards: bool = False
    cut: tuple[int, int] | None = None
    resident: int = 0
    overlap: bool = False
    registers: int = 0

    def bind(self, data: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
        """Fill `out` from the blocks of `data`, as a call without arguments."""
        kind = GGMLType.Q8_0
        lanes, warps = self.cut or launch.KERNELS[kind].cut(out.numel())
        lanes = lanes if CUDA else 512
        blocks = data.numel() // BLOCKS[kind].nbytes
        programs = -(-blocks * 2 // lanes)
        if self.resident:
            processors = torch.cuda.get_device_properties(0).multi_processor_count if CUDA else 2
            programs = min(programs, processors * self.resident)
        options: dict[str, int] = {"launch_pdl": True} if self.overlap else {}
        if self.registers:
            options["maxnreg"] = self.registers
        assert data.data_ptr() % 16 == out.data_ptr() % 16 == 0 or not CUDA
        variant = ("dequantise_ahead", self, lanes, warps)
        constants = self.load, self.store, self.backwards, self.resident > 0, self.overlap and CUDA, lanes

        def start() -> None:
            kept.start(variant, dequantize, programs, (data, out, blocks), lambda: constants, warps, **options)

        start()
        run = kept.bound(variant, programs, 0) if CUDA else None
        return partial(run, data.data_ptr(), out.data_ptr(), blocks) if run else start
