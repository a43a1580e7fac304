"""Bytes of a weight on their way through shared memory, and words read from wherever they are.

[Note: Staging]
Blocks of 18 or 34 bytes lie on even addresses: a lane that reads its share of one from global memory does so in pieces
of two bytes, of which a warp's 32 lie in eight lines, and the first-level cache looks up a line a cycle. Each warp
therefore copies segments of its rows into shared memory, 16 bytes at a time and past that cache (`cp.async`), some
segments ahead of the one that it multiplies; no register holds what is on its way. A quad of lanes copies its own rows.
What is copied starts at a multiple of 16, up to 15 bytes before the segment, and ends likewise.

Triton has no name for shared memory: it is reserved by a declaration in PTX, and addressed by integers. The readers
below take such an address, or a pointer to global memory: without a GPU the bytes are read where they lie.
"""

# ruff: noqa: N803  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import triton
import triton.language as tl

LIMIT = 48 * 1024  # bytes of shared memory that a program may declare


def declaration(nbytes: int) -> str:
    """PTX for `reserve`. A kernel has room for one, of at most LIMIT bytes."""
    return f".shared .align 128 .b8 staged[{nbytes}]; mov.u32 $0, staged;"


@triton.jit
def reserve(lane, DECLARE: tl.constexpr):
    """The address in shared memory of what `DECLARE`, from `declaration`, declares."""
    return tl.inline_asm_elementwise(DECLARE, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def copy16(to, source, at, end):
    """Start copying 16 bytes from the address `source` to the shared address `to`, in the lanes where at < end."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.s32 p, $3, $4; @p cp.async.cg.shared.global [$1], [$2], 16; mov.b32 $0, 0; }",
        "=r,r,l,r,r",
        [to, source, at, end],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def for_its_effect(ASM: tl.constexpr, lane):
    """Instructions without arguments or result, for which Triton wants a tensor all the same."""
    tl.inline_asm_elementwise(ASM, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def close_group(lane):
    """What the warp has started copying since the last call is a group."""
    for_its_effect("cp.async.commit_group; mov.b32 $0, 0;", lane)


@triton.jit
def wait_for_all_but(lane, GROUPS: tl.constexpr):
    """Wait until no more than the last GROUPS groups of the warp, one or two, are on their way."""
    tl.static_assert(GROUPS == 1 or GROUPS == 2)
    if GROUPS == 1:
        for_its_effect("cp.async.wait_group 1; bar.warp.sync 0xffffffff; mov.b32 $0, 0;", lane)
    else:
        for_its_effect("cp.async.wait_group 2; bar.warp.sync 0xffffffff; mov.b32 $0, 0;", lane)


@triton.jit
def sync_warp(lane):
    """All lanes of the warp have read what they wanted to."""
    for_its_effect("bar.warp.sync 0xffffffff; mov.b32 $0, 0;", lane)


@triton.jit
def byte(src, AT: tl.constexpr):
    """The byte at src + AT, zero-extended to int32."""
    if src.dtype.is_ptr():
        w = tl.load(src + AT).to(tl.int32)
    else:
        w = tl.inline_asm_elementwise(
            "ld.shared.u8 $0, [$1];", "=r,r", [src + AT], dtype=tl.int32, is_pure=False, pack=1
        )
    return w


@triton.jit
def half(src, AT: tl.constexpr, ALIGN: tl.constexpr):
    """The 16-bit little-endian word at src + AT, zero-extended to int32; `src` is a multiple of ALIGN."""
    if ALIGN % 2 != 0 or AT % 2 != 0:
        w = byte(src, AT) | (byte(src, AT + 1) << 8)
    elif src.dtype.is_ptr():
        w = tl.load((src + AT).to(tl.pointer_type(tl.uint16), bitcast=True)).to(tl.int32)
    else:
        w = tl.inline_asm_elementwise(
            "ld.shared.u16 $0, [$1];", "=r,r", [src + AT], dtype=tl.int32, is_pure=False, pack=1
        )
    return w


@triton.jit
def word(src, AT: tl.constexpr, ALIGN: tl.constexpr):
    """The 32-bit little-endian word at src + AT."""
    if ALIGN % 4 != 0 or AT % 4 != 0:
        w = half(src, AT, ALIGN) | (half(src, AT + 2, ALIGN) << 16)
    elif src.dtype.is_ptr():
        w = tl.load((src + AT).to(tl.pointer_type(tl.int32), bitcast=True))
    else:
        w = tl.inline_asm_elementwise(
            "ld.shared.u32 $0, [$1];", "=r,r", [src + AT], dtype=tl.int32, is_pure=False, pack=1
        )
    return w


@triton.jit
def words(src, AT: tl.constexpr, ALIGN: tl.constexpr):
    """The two 32-bit words at src + AT."""
    if src.dtype.is_ptr() or ALIGN % 8 != 0 or AT % 8 != 0:
        a = word(src, AT, ALIGN)
        b = word(src, AT + 4, ALIGN)
    else:
        a, b = tl.inline_asm_elementwise(
            "ld.shared.v2.u32 {$0, $1}, [$2];",
            "=r,=r,r",
            [src + AT],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return a, b


@triton.jit
def quad(src, AT: tl.constexpr, ALIGN: tl.constexpr):
    """The four 32-bit words at src + AT."""
    if src.dtype.is_ptr() or ALIGN % 16 != 0 or AT % 16 != 0:
        a, b = words(src, AT, ALIGN)
        c, d = words(src, AT + 8, ALIGN)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            "ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r",
            [src + AT],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return a, b, c, d
