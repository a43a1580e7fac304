"""The tensor types that a GGUF file can hold, as data.

A quantised type packs a fixed number of elements into a *block* of a fixed number of bytes; a tensor
is its blocks in row order, nothing between them. `BLOCKS` is the one table of these sizes: the reader
checks tensor extents with it, the dequantisers and the kernels take their geometry from it.

Type numbers and sizes: ggml.h and ggml-common.h of llama.cpp, equal to gguf-py's GGML_QUANT_SIZES
(a test compares them).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import prod


class GGMLType(IntEnum):
    """ggml's tensor type numbers, by ggml's names. Gaps are numbers that ggml retired."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41


@dataclass(frozen=True)
class BlockLayout:
    """Geometry of one block: `elements` values in `nbytes` bytes."""

    elements: int
    nbytes: int


BLOCKS: dict[GGMLType, BlockLayout] = {
    GGMLType.F32: BlockLayout(1, 4),
    GGMLType.F16: BlockLayout(1, 2),
    GGMLType.BF16: BlockLayout(1, 2),
    GGMLType.F64: BlockLayout(1, 8),
    GGMLType.I8: BlockLayout(1, 1),
    GGMLType.I16: BlockLayout(1, 2),
    GGMLType.I32: BlockLayout(1, 4),
    GGMLType.I64: BlockLayout(1, 8),
    GGMLType.Q4_0: BlockLayout(32, 18),
    GGMLType.Q4_1: BlockLayout(32, 20),
    GGMLType.Q5_0: BlockLayout(32, 22),
    GGMLType.Q5_1: BlockLayout(32, 24),
    GGMLType.Q8_0: BlockLayout(32, 34),
    GGMLType.Q8_1: BlockLayout(32, 40),
    GGMLType.Q2_K: BlockLayout(256, 84),
    GGMLType.Q3_K: BlockLayout(256, 110),
    GGMLType.Q4_K: BlockLayout(256, 144),
    GGMLType.Q5_K: BlockLayout(256, 176),
    GGMLType.Q6_K: BlockLayout(256, 210),
    GGMLType.Q8_K: BlockLayout(256, 292),
    GGMLType.IQ1_S: BlockLayout(256, 50),
    GGMLType.IQ1_M: BlockLayout(256, 56),
    GGMLType.IQ2_XXS: BlockLayout(256, 66),
    GGMLType.IQ2_XS: BlockLayout(256, 74),
    GGMLType.IQ2_S: BlockLayout(256, 82),
    GGMLType.IQ3_XXS: BlockLayout(256, 98),
    GGMLType.IQ3_S: BlockLayout(256, 110),
    GGMLType.IQ4_NL: BlockLayout(32, 18),
    GGMLType.IQ4_XS: BlockLayout(256, 136),
    GGMLType.TQ1_0: BlockLayout(256, 54),
    GGMLType.TQ2_0: BlockLayout(256, 66),
    GGMLType.MXFP4: BlockLayout(32, 17),
    GGMLType.NVFP4: BlockLayout(64, 36),
    GGMLType.Q1_0: BlockLayout(128, 18),
}

# Types whose elements torch holds as they are.
PLAIN = frozenset(t for t, layout in BLOCKS.items() if layout.elements == 1)

# Types that ggml uses inside a computation and for which no reference dequantiser is published:
# the reader accepts a file that holds one, a loader names it and refuses.
NO_REFERENCE = frozenset({GGMLType.Q8_1, GGMLType.Q8_K, GGMLType.Q1_0})

# Every block-quantised type that Sluice turns into tensors.
QUANTISED = frozenset(BLOCKS) - PLAIN - NO_REFERENCE


def byte_size(shape: tuple[int, ...], ggml_type: GGMLType) -> int:
    """Bytes of a tensor with row-major `shape` (last dimension contiguous) in `ggml_type`.

    Raises:
        ValueError: the last dimension is not a whole number of blocks.
    """
    layout = BLOCKS[ggml_type]
    row = shape[-1] if shape else 1
    if row % layout.elements:
        raise ValueError(
            f"rows of {row} elements are not a whole number of {ggml_type.name} blocks ({layout.elements} elements)"
        )
    return prod(shape) // layout.elements * layout.nbytes
