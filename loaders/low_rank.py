"""LoRA as what it is, two thin matrices, without ever holding a patched weight.

A weight W [N, K] with adapters has the product x (W + B A)^T, where A [R, K] and B [N, R] are the factors of all its
adapters, concatenated along the rank, with strength and alpha folded into B. That product can be had in two ways:

    beside    x W^T + (x A^T) B^T     2 M R (K + N) operations for M rows of x; W stays as it is, blocks included
    folded    x (W + B A)^T           2 N K R operations, into the dense weight that lives for this call anyway

[Note: Which way] The operations are equal at M = N K / (N + K), and so, within a factor of two, are the bytes moved.
Below that many rows the first way is the cheaper one, above it the second. Folding on a GPU adds in float32 and rounds
the weight once; the host's own arithmetic rounds B A, its multiple and the sum, and moves three times the bytes.

Adapters of parts of a weight's rows (q, k and v of a fused projection) stay apart, because padded with zeros they
would cost as much as three adapters of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .gguf.types import GGMLType
from .quant import dispatch

WAYS = ("auto", "runtime", "merge")  # by [Note: Which way]; always beside; always folded


@dataclass(frozen=True)
class Adapter:
    """`scale` up down, added to the rows of a weight from `start` on.

    Args:
        up: [n, r], of any float dtype, on the CPU.
        down: [r, K], likewise.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    start: int = 0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def rows(self) -> tuple[int, int]:
        return self.start, self.start + self.up.shape[0]


@dataclass(frozen=True)
class Part:
    """The adapters of the same rows of a weight: `b` [rows, ranks] times those `ranks` of the factors' A."""

    rows: slice
    ranks: slice
    b: torch.Tensor


class Factors:
    """The adapters of one weight on one device.

    Args:
        adapters: at least one.
        device: where the factors are made; the adapters are only read.
        dtype: what they are rounded to, B after strength and alpha are in it.
    """

    def __init__(self, adapters: Sequence[Adapter], device: torch.device, dtype: torch.dtype) -> None:
        by_rows: dict[tuple[int, int], list[Adapter]] = {}
        for adapter in adapters:
            by_rows.setdefault(adapter.rows, []).append(adapter)
        total = sum(adapter.rank for adapter in adapters)
        self.a = torch.empty((total, adapters[0].down.shape[1]), dtype=dtype, device=device)
        self.parts: list[Part] = []
        first = 0
        for (start, stop), group in by_rows.items():
            ranks = slice(first, first + sum(adapter.rank for adapter in group))
            b = torch.empty((stop - start, ranks.stop - ranks.start), dtype=dtype, device=device)
            for adapter in group:
                self.a[first : first + adapter.rank].copy_(adapter.down)
                column = first - ranks.start
                up = adapter.up.to(device)
                scaled = up if adapter.scale == 1 else up.float() * adapter.scale
                b[:, column : column + adapter.rank].copy_(scaled)
                first += adapter.rank
            self.parts.append(Part(slice(start, stop), ranks, b))

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + sum(part.b.nbytes for part in self.parts)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in another dtype; themselves if they have it."""
        if dtype == self.a.dtype:
            return self
        other = object.__new__(Factors)
        other.a = self.a.to(dtype)
        other.parts = [Part(part.rows, part.ranks, part.b.to(dtype)) for part in self.parts]
        return other

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        """Add B A to `weight` [N, ...], contiguous, in place; return it."""
        rows = weight.view(weight.shape[0], -1)
        factors = self.to(weight.dtype)
        for part in factors.parts:
            rows[part.rows].addmm_(part.b, factors.a[part.ranks])
        return weight

    def folded_into(
        self, data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight of `shape` and `dtype` that `data` encodes plus B A: in one go where a kernel does that."""
        factors = self.to(dtype)
        parts = sorted(factors.parts, key=lambda part: part.rows.start)
        if all(one.rows.stop <= next_one.rows.start for one, next_one in pairwise(parts)):
            products = [(part.rows, factors.a[part.ranks], part.b) for part in parts]
            made = dispatch.dequantize_with_products(data, ggml_type, shape, products)
            if made is not None:
                return made
        return factors.fold(dispatch.dequantize(data, ggml_type, shape, dtype))

    def add_product(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`y` [..., N] plus what the adapters make of `x` [..., K], in place where `y` is contiguous."""
        factors = self if y.dtype == self.a.dtype else self.to(y.dtype)
        y = y.contiguous()
        flat = y.view(-1, y.shape[-1])
        low = torch.mm(x.reshape(-1, x.shape[-1]), factors.a.t())
        if len(factors.parts) == 1 and factors.parts[0].b.shape[0] == y.shape[-1]:
            flat.addmm_(low, factors.parts[0].b.t())  # few tokens wait for the host, which views cost microseconds
            return y
        for part in factors.parts:
            flat[:, part.rows].addmm_(low[:, part.ranks], part.b.t())
        return y


def nbytes(adapters: Sequence[Adapter], dtype: torch.dtype) -> int:
    """What `Factors` of them take."""
    return sum(a.up.numel() + a.down.numel() for a in adapters) * dtype.itemsize


def beside_is_cheaper(x_rows: int, shape: Sequence[int]) -> bool:
    """For a weight of `shape` (N, K): [Note: Which way]."""
    n, k = shape
    return x_rows * (n + k) < n * k
