"""Weights into blocks: the quantisers of every type that the dequantisers know, in plain torch, on any device.

    a tensor --chunks of whole blocks--> float32 --quantiser--> bytes of a file

What each type stores is said by its dequantiser (reference_linear, reference_codebook), which is also what the tests
decode with; how scales are found is in quantize_search. Temporaries are bounded by the chunk, not by the tensor, so
a weight of any size costs its bytes and some tens of megabytes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from ..gguf.types import BLOCKS, PLAIN, GGMLType, byte_size
from . import quantize_blocks, quantize_grids, quantize_kquants  # noqa: F401  (they fill the table)
from .quantize_table import QUANTISERS
from .reference import PLAIN_DTYPES

CPU_CHUNK = 1 << 17  # elements; a dozen float32 temporaries of it stay in cache
DEVICE_CHUNK = 1 << 22


# The largest magnitude that a type is given. Most keep a half for a scale; larger weights are a broken model's.
LARGEST = dict.fromkeys((GGMLType.F32, GGMLType.BF16, GGMLType.MXFP4), 3e38) | {GGMLType.NVFP4: 6.0 * 448}
LARGEST_OF_OTHERS = 65504.0


class UnrepresentableError(ValueError):
    """A weight holds a NaN, an infinity, or a number too large for the type."""


def quantize(
    weight: torch.Tensor,
    ggml_type: GGMLType,
    device: torch.device | str | None = None,
    check: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The bytes of `weight` in `ggml_type`, as `reference.dequantize` reads them.

    Args:
        weight: of any floating-point dtype and shape, on any device; its last dimension is whole blocks.
        device: where the work is done, a chunk at a time; the weight's own by default.
        check: called after each chunk with the elements done so far; what it raises ends the work.

    Returns:
        uint8 of shape `[*weight.shape[:-1], bytes of a row]` on the CPU.

    Raises:
        ValueError: the type has no quantiser, or a row is not whole blocks.
        UnrepresentableError: the weight holds a NaN, an infinity, or a number too large for the type.
    """
    if ggml_type not in QUANTISERS and ggml_type not in PLAIN:
        raise ValueError(f"nothing writes GGUF type {ggml_type.name}; choose one of {', '.join(names())}")
    nbytes, layout = byte_size(tuple(weight.shape), ggml_type), BLOCKS[ggml_type]
    shape = (*weight.shape[:-1], weight.shape[-1] // layout.elements * layout.nbytes) if weight.dim() else (nbytes,)
    out = torch.empty(nbytes, dtype=torch.uint8)
    source = weight.reshape(-1)
    device = torch.device(device or weight.device)
    step = CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
    for first in range(0, prod(weight.shape), step):
        chunk = source[first : first + step].to(device)
        start = first // layout.elements * layout.nbytes
        blocks = _blocks(chunk, ggml_type)
        out[start : start + blocks.numel()] = blocks.cpu()
        if check is not None:
            check(first + chunk.numel())
    return out.view(shape)


def _blocks(chunk: torch.Tensor, ggml_type: GGMLType) -> torch.Tensor:
    values = chunk.float()
    largest, limit = float(values.abs().max()), LARGEST.get(ggml_type, LARGEST_OF_OTHERS)
    if not largest <= limit:  # a NaN is not, either
        raise UnrepresentableError(f"it holds the number {largest:g}, and {ggml_type.name} nothing beyond {limit:g}")
    if ggml_type in PLAIN:
        return values.to(PLAIN_DTYPES[ggml_type]).view(torch.uint8)
    return QUANTISERS[ggml_type](values.view(-1, BLOCKS[ggml_type].elements)).flatten()


def names() -> list[str]:
    """The types that `quantize` writes, by ggml's names."""
    return sorted(t.name for t in QUANTISERS)
