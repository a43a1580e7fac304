"""Dequantisation in plain torch: the specification, the fallback and the oracle of every faster way.

    bytes of a file --chunks of whole blocks--> float32 --rounded once--> the tensor asked for

The result equals `gguf.quants.dequantize` bit for bit in float32, and in bfloat16 and float16 it is that
float32 rounded once. (The one freedom: a NaN is a NaN; its payload differs between vector units.) What each
type means is in reference_linear and reference_codebook, a small function for each; this file walks the data.

`data` may be any view of a file: at any address, and in memory that must not be written, for a tensor of a
GGUF file lies wherever its header happened to end. torch reads words only where words may lie, so data that is
not aligned is copied a chunk at a time; a chunk is small, and the copy stays in cache.

Temporaries are bounded by the chunk, not by the tensor: float32 scratch and at most three times as much of
integers and partial sums. The chunks are the smallest with nearly full speed. On a CPU (two threads, Q4_K to
bfloat16) 2^18, 2^20 and 2^21 elements gave 2.3, 3.1 and 3.3 GB/s, while Q4_0 fell from 4.3 over 3.8 to 2.0. On an
H200, where launches bind, 2^22, 2^24 and 2^26 elements gave 55, 146 and 170 GB/s for 37, 148 and 592 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch

from ..gguf.types import BLOCKS, PLAIN, BlockLayout, GGMLType
from . import reference_codebook, reference_linear  # noqa: F401  (they fill the table)
from .block_fields import DEQUANTISERS

PLAIN_DTYPES: dict[GGMLType, torch.dtype] = {
    GGMLType.F64: torch.float64,
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
    GGMLType.I8: torch.int8,
    GGMLType.I16: torch.int16,
    GGMLType.I32: torch.int32,
    GGMLType.I64: torch.int64,
}

IMPLEMENTED: frozenset[GGMLType] = frozenset(DEQUANTISERS) | frozenset(PLAIN_DTYPES)

CPU_CHUNK = 1 << 20  # elements
DEVICE_CHUNK = 1 << 24
ALIGNMENT = 8  # the widest word that a dequantiser or a plain type views


def dequantize(
    data: torch.Tensor,
    ggml_type: GGMLType,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make a tensor of `shape` and `dtype` from the bytes of one in `ggml_type`.

    Args:
        data: uint8 of any shape on any device, read only; its blocks are taken in memory order.
        shape: any shape with as many elements; rows need not be whole blocks (`comfy.gguf.orig_shape`).
        dtype: a floating-point type; a plain type converts to any dtype that torch converts it to.
        out: contiguous, of `shape` and `dtype`, on the device of `data`: filled and returned.

    Returns:
        A contiguous tensor on the device of `data`, a new one without `out`.

    Raises:
        ValueError: the type has no reference, or the bytes are not those of `shape`.
    """
    layout = _checked_layout(data, ggml_type, dtype)
    elements = prod(shape)
    blocks = data.numel() // layout.nbytes
    if blocks * layout.nbytes != data.numel() or blocks * layout.elements != elements:
        raise ValueError(
            f"{data.numel()} bytes are not a {ggml_type.name} tensor of shape {tuple(shape)}: its {elements} elements "
            f"take {elements / layout.elements:g} blocks of {layout.nbytes} bytes. "
            "Either the shape is not this tensor's or its data is cut short."
        )
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=data.device)
    _fill(out.view(-1), data.reshape(-1), ggml_type, layout)
    return out


def dequantize_rows(
    data: torch.Tensor,
    ggml_type: GGMLType,
    row_elements: int,
    rows: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Gather `rows` of a matrix while it is quantised, then dequantise only those (an embedding).

    Args:
        data: the bytes of the matrix, as for `dequantize`.
        row_elements: elements of one row, whole blocks.
        rows: integer indices of any shape, on the device of `data`.

    Returns:
        A new tensor of shape `rows.shape + (row_elements,)`.

    Raises:
        ValueError: a row is not whole blocks, or the bytes are not whole rows, or as for `dequantize`.
        IndexError: a row number is out of range.
    """
    layout = _checked_layout(data, ggml_type, dtype)
    row_bytes, rest = divmod(row_elements * layout.nbytes, layout.elements)
    if rest or row_elements % layout.elements or row_bytes == 0 or data.numel() % row_bytes:
        raise ValueError(
            f"{data.numel()} bytes of {ggml_type.name} are not rows of {row_elements} elements: a row must be whole "
            f"blocks of {layout.elements} elements in {layout.nbytes} bytes. Dequantise the whole tensor instead."
        )
    gathered = data.reshape(-1, row_bytes).index_select(0, rows.reshape(-1))
    return dequantize(gathered, ggml_type, (*rows.shape, row_elements), dtype)


def chunks(blocks: int, layout: BlockLayout, chunk_elements: int) -> Iterator[tuple[slice, slice]]:
    """Split a tensor of `blocks` blocks: pairs of a slice of its bytes and the slice of its elements.

    Each has at most `chunk_elements` elements (but at least a few blocks) and starts at a multiple of ALIGNMENT
    bytes, so that chunks of aligned data are aligned. Plain integers: no tensor is too long.
    """
    step = max(chunk_elements // layout.elements // ALIGNMENT, 1) * ALIGNMENT
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        yield (
            slice(first * layout.nbytes, last * layout.nbytes),
            slice(first * layout.elements, last * layout.elements),
        )


def _fill(out: torch.Tensor, data: torch.Tensor, ggml_type: GGMLType, layout: BlockLayout) -> None:
    """Dequantise flat `data` into flat `out`, a chunk at a time."""
    chunk_elements = CPU_CHUNK if data.device.type == "cpu" else DEVICE_CHUNK
    blocks = data.numel() // layout.nbytes
    aligned = data.storage_offset() % ALIGNMENT == 0 and data.data_ptr() % ALIGNMENT == 0
    scratch = None
    for byte_range, element_range in chunks(blocks, layout, chunk_elements):
        source = data[byte_range]
        if not aligned:
            source = source.clone()
        target = out[element_range]
        if ggml_type in PLAIN:
            target.copy_(source.view(PLAIN_DTYPES[ggml_type]))
            continue
        values = target
        if out.dtype != torch.float32:
            if scratch is None:
                scratch = torch.empty(target.numel(), dtype=torch.float32, device=out.device)
            values = scratch[: target.numel()]
        DEQUANTISERS[ggml_type](source.view(-1, layout.nbytes), values.view(-1, layout.elements))
        if values is not target:
            target.copy_(values)


def _checked_layout(data: torch.Tensor, ggml_type: GGMLType, dtype: torch.dtype) -> BlockLayout:
    """Geometry of a type that can be dequantised to `dtype`; ValueError says what else was asked for."""
    if ggml_type not in IMPLEMENTED:
        name = getattr(ggml_type, "name", ggml_type)
        raise ValueError(
            f"GGUF type {name} cannot be dequantised: no reference for it is published. "
            f"Convert the file to one of {', '.join(sorted(t.name for t in DEQUANTISERS))}."
        )
    if data.dtype != torch.uint8:
        raise ValueError(f"{ggml_type.name} data must be uint8 bytes, not {data.dtype}; view it as torch.uint8")
    if ggml_type not in PLAIN and not dtype.is_floating_point:
        raise ValueError(f"{ggml_type.name} holds fractions and cannot become {dtype}; ask for a floating-point dtype")
    return BLOCKS[ggml_type]
