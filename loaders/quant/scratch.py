"""The memory that a layer's dense weight lives in for the length of one call, on a CPU.

torch's CPU allocator gives a large block back to the operating system when it is freed, and the next one is zeroed
page by page: for a float32 weight of 38 MB that takes longer than dequantising it from Q8_0. So a model keeps one
buffer, as large as its largest weight. GPU allocators keep blocks themselves: a buffer of ours makes no step shorter
there (benchmarks/results/flux_variants_h200.txt).

The buffer goes when the host moves the model (to unload it, say), or with the model that owns it. A result must not
be a view of it, and it must not be used where autograd keeps the weight for a backward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod

import torch


class Scratch(threading.local):
    """One growing buffer for each thread that runs the model."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor, valid until the next `take` of the same thread."""
        nbytes = prod(shape) * dtype.itemsize
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffer[:nbytes].view(dtype).view(shape)

    def clear(self) -> None:
        """Give the memory back; the next `take` makes a new buffer."""
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        return self._buffer.numel()
