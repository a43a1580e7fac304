"""What the reference dequantisers are made of: the table of them, and readers of the fields of a block.

A dequantiser is `f(blocks, out)`: `blocks` is uint8 `[n, nbytes]`, contiguous, aligned to 8 bytes, never
written to; `out` is float32 `[n, elements]`, contiguous, filled completely. Every step is a torch op that
runs on the device of `blocks`, and none needs float64.

[Note: Fast on a CPU] torch's vector loops need long rows, and a block's fields are short ones. Measured on one
core, a million elements a call, in ns an element:

* A byte operation on one contiguous run takes 0.02, on rows of 32 bytes that are not contiguous 0.3. So
  integers are made with operations over the whole block, fields that they are not meant for included, or over
  a field of 64 bytes or more, whose result is contiguous.
* A float operation on rows of 16 or 32 takes 0.06 as long as its operands have two different strides at most
  (then the rows are one nested loop), 0.16 and more otherwise. So a scale is multiplied in over `[groups, size]`
  once all groups are in place, or while one part of every group is put in its place.
* A gather takes 0.6 an entry whatever its width, so tables hold rows: eight int8 values are one int64.

Words of several bytes are little-endian in GGUF and are read in the machine's own order; the reader refuses
big-endian files and machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch

from ..gguf.types import GGMLType

Dequantiser = Callable[[torch.Tensor, torch.Tensor], None]

DEQUANTISERS: dict[GGMLType, Dequantiser] = {}


def dequantises(ggml_type: GGMLType) -> Callable[[Dequantiser], Dequantiser]:
    """Enter the decorated function into the table as the dequantiser of `ggml_type`."""

    def enter(function: Dequantiser) -> Dequantiser:
        assert ggml_type not in DEQUANTISERS, f"two dequantisers for {ggml_type.name}"
        DEQUANTISERS[ggml_type] = function
        return function

    return enter


def field(blocks: torch.Tensor, start: int, size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """A copy of `size` bytes at byte `start` of every block, read as `dtype`: `[n, size / itemsize]`.

    A copy because a word of four bytes in a block of, say, 66 is not where torch can view it. (`contiguous()`
    would not copy the field of a single block.)
    """
    return blocks[:, start : start + size].clone(memory_format=torch.contiguous_format).view(dtype)


def half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 value at byte `start` of every block, as float32 `[n, 1]`."""
    return blocks[:, start : start + 2].view(torch.float16).float()


def nibbles(source: torch.Tensor, bias: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high four bits of every byte less `bias`, as two float32 tensors of the shape of `source`."""
    low, high = source & 15, source >> 4
    if bias:  # uint8 wraps round to what int8 means
        low, high = low.sub_(bias).view(torch.int8), high.sub_(bias).view(torch.int8)
    return low.float(), high.float()


def parts(source: torch.Tensor, bits: int) -> Iterator[torch.Tensor]:
    """Every `bits`-bit part of every byte, the lowest first: 8 / bits uint8 tensors of the shape of `source`."""
    for shift in range(0, 8, bits):
        yield (source >> shift).bitwise_and_((1 << bits) - 1)


def fields_at(source: torch.Tensor, shifts: range, mask: int) -> torch.Tensor:
    """`mask`ed fields at each of `shifts` in every item of `source`: `[*source.shape, len(shifts)]`."""
    amounts = torch.arange(shifts.start, shifts.stop, shifts.step, dtype=source.dtype, device=source.device)
    return (source.unsqueeze(-1) >> amounts).bitwise_and_(mask)


def look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of a one-dimensional table, read as int8 and laid end to end."""
    return table.index_select(0, index.reshape(-1).int()).view(torch.int8)


@cache
def bit_table(device: torch.device) -> torch.Tensor:
    """For every byte its eight bits, lowest first, as the eight bytes of an int64. 2 kB for each device."""
    bits = fields_at(torch.arange(256, dtype=torch.uint8), range(8), 1)
    return bits.view(torch.int64).flatten().to(device)
