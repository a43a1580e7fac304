"""LoRA as what it is, two thin matrices, without ever holding a patched weight.

A weight W [N, K] with adapters has the product x (W + B A)^T, where A [R, K] and B [N, R] are the factors of all its
adapters, concatenated along the rank, with strength and alpha folded into B. That product can be had in two ways:

    beside    x W^T + (x A^T) B^T     2 M R (K + N) operations for M rows of x; W stays as it is, blocks included
    folded    x (W + B A)^T           2 N K R operations, into the dense weight that lives for this call anyway

[Note: Which way] Where a kernel adds B A while it makes the dense weight, that costs next to nothing and no launch, so
it is done wherever the dense weight is made; what is multiplied as it is, in blocks, by few rows of x, has its
adapters beside. Where there is no such kernel, the operations are equal at M = N K / (N + K), and so, within a factor
of two, are the bytes moved: below that many rows the first way is the cheaper one, above it the second. Folding on a
GPU adds in float32 and rounds the weight once (or twice, without the kernel); the host's own arithmetic rounds B A,
its multiple and the sum, and moves three times the bytes.

Adapters of parts of a weight's rows (q, k and v of a fused projection) stay apart, because padded with zeros they
would cost as much as three adapters of the whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch

from .gguf.types import GGMLType
from .quant import dispatch
from .quant.layout import is_gguf
from .sizes import aligned
from .uploads import upload

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

    @cached_property
    def rank(self) -> int:
        return self.down.shape[0]

    @cached_property
    def rows(self) -> tuple[int, int]:
        return self.start, self.start + self.up.shape[0]


@dataclass(frozen=True)
class Part:
    """The adapters of the same rows of a weight: `b` [rows, ranks] times those `ranks` of the factors' A."""

    rows: slice
    ranks: slice
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.ranks.stop - self.ranks.start


class Factors:
    """The adapters of one weight on one device.

    Args:
        adapters: at least one.
        device: where the factors are made; the adapters are only read.
        dtype: what they are rounded to, B after strength and alpha are in it.
    """

    def __init__(self, adapters: Sequence[Adapter], device: torch.device, dtype: torch.dtype) -> None:
        groups = _by_rows(adapters)
        self._lay_out(groups, lambda rows, columns: torch.empty((rows, columns), dtype=dtype, device=device))
        self._fill(groups)

    @classmethod
    def in_memory(
        cls, adapters: Sequence[Adapter], dtype: torch.dtype, memory: torch.Tensor, *, fill: bool = False
    ) -> Factors:
        """Factors that lie in `memory`, uint8 and `packed_bytes` long, on any device; written there if `fill`."""
        groups, offset = _by_rows(adapters), 0

        def place(rows: int, columns: int) -> torch.Tensor:
            nonlocal offset
            start, nbytes = offset, rows * columns * dtype.itemsize
            offset += aligned(nbytes)
            return memory[start : start + nbytes].view(dtype).view(rows, columns)

        factors = object.__new__(cls)
        factors._lay_out(groups, place)
        if fill:
            factors._fill(groups)
        return factors

    def _lay_out(self, groups: list[list[Adapter]], place: Callable[[int, int], torch.Tensor]) -> None:
        self.a = place(sum(adapter.rank for group in groups for adapter in group), groups[0][0].down.shape[1])
        self.parts: list[Part] = []
        first = 0
        for group in groups:
            ranks = slice(first, first + sum(adapter.rank for adapter in group))
            start, stop = group[0].rows
            self.parts.append(Part(slice(start, stop), ranks, place(stop - start, ranks.stop - ranks.start)))
            first = ranks.stop
        self._prepare()

    def _fill(self, groups: list[list[Adapter]]) -> None:
        for part, group in zip(self.parts, groups, strict=True):
            column = 0
            for adapter in group:
                ranks = slice(column, column + adapter.rank)
                upload(adapter.down, self.a.device, self.a[part.ranks][ranks].copy_)
                upload(adapter.up, part.b.device, partial(_scale_into, part.b[:, ranks], adapter.scale))
                column = ranks.stop

    def _prepare(self) -> None:
        """What every use needs, found out once: at few tokens a step waits for Python."""
        self._a_t = self.a.t()
        self._b_t = [part.b.t() for part in self.parts]
        parts = sorted(self.parts, key=lambda part: part.rows.start)
        apart = all(one.rows.stop <= other.rows.start for one, other in pairwise(parts))
        self.products = [(part.rows, self.a[part.ranks], part.b) for part in parts] if apart else []
        self._most_rows_beside: dict[GGMLType | None, int] = {}

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
        other._prepare()
        return other

    def run_beside(self, x_rows: int, weight: Any, shape: Sequence[int]) -> bool:
        """Whether that is the cheaper way for so many rows of x, by [Note: Which way], on the factors' device.

        Args:
            weight: of `shape`, quantised or not.
        """
        if torch.compiler.is_compiling():  # which folds without the kernel
            return x_rows <= self._rows_beside(None, shape)
        ggml_type = weight._params.ggml_type if is_gguf(weight) else None
        most = self._most_rows_beside.get(ggml_type)
        if most is None:
            most = self._most_rows_beside[ggml_type] = self._rows_beside(ggml_type, shape)
        return x_rows <= most

    def _rows_beside(self, ggml_type: GGMLType | None, shape: Sequence[int]) -> int:
        n, k = shape
        if ggml_type is not None and self.products:
            kind, rank = self.a.device.type, max(part.rank for part in self.parts)
            if dispatch.adds_products(kind, ggml_type, shape, self.a.dtype, rank):
                return max(dispatch.few_elements(kind, ggml_type, shape), 0) // k
        return (n * k - 1) // (n + k)

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
        if factors.products:
            made = dispatch.dequantize_with_products(data, ggml_type, shape, factors.products)
            if made is not None:
                return made
        return factors.fold(dispatch.dequantize(data, ggml_type, shape, dtype))

    def add_product(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`y` [..., N] plus what the adapters make of `x` [..., K], in place where `y` is contiguous."""
        factors = self if y.dtype == self.a.dtype else self.to(y.dtype)
        y = y.contiguous()
        flat = y.view(-1, y.shape[-1])
        low = torch.mm(x.reshape(-1, x.shape[-1]), factors._a_t)
        if len(factors.parts) == 1 and factors._b_t[0].shape[1] == y.shape[-1]:
            flat.addmm_(low, factors._b_t[0])  # views cost microseconds
            return y
        for part, b_t in zip(factors.parts, factors._b_t, strict=True):
            flat[:, part.rows].addmm_(low[:, part.ranks], b_t)
        return y


class FoldedWeight:
    """A weight with adapters in it, made again at each use; from the second use on by a call that is bound to both.

    A weight on a device stays where it is between two steps, and so do the factors. This keeps neither alive: they are
    given at each use, and `is_of` says whether they are the same.
    """

    def __init__(self, weight: Any, factors: Factors, dtype: torch.dtype) -> None:
        self._weight, self._factors, self._dtype = weakref.ref(weight), weakref.ref(factors), dtype
        self._call: Callable[[], torch.Tensor] | None = None
        self._uses = 0

    def is_of(self, weight: Any, factors: Factors, dtype: torch.dtype) -> bool:
        return self._weight() is weight and self._factors() is factors and self._dtype is dtype

    def dense(self, weight: Any, factors: Factors) -> torch.Tensor:
        """A new tensor of the weight's shape, in the dtype."""
        if self._call is not None:
            return self._call()
        self._uses += 1
        data, params = weight._qdata, weight._params
        if self._uses == 2 and factors.products and factors.a.dtype is self._dtype:
            self._call = dispatch.bind_with_products(data, params.ggml_type, params.orig_shape, factors.products)
        return factors.folded_into(data, params.ggml_type, params.orig_shape, self._dtype)


def _scale_into(there: torch.Tensor, scale: float, up: torch.Tensor) -> None:
    """Fill `there` with `scale` up, multiplied in float32 and rounded once."""
    if scale == 1:
        there.copy_(up)
    elif there.dtype == up.dtype and not up.requires_grad:
        torch.mul(up, scale, out=there)  # which multiplies 16 bits in float32
    else:
        there.copy_(up.float() * scale)


def nbytes(adapters: Sequence[Adapter], dtype: torch.dtype) -> int:
    """What `Factors` of them take."""
    return sum(a.up.numel() + a.down.numel() for a in adapters) * dtype.itemsize


def parts(adapters: Sequence[Adapter]) -> tuple[tuple[int, int, int], ...]:
    """Of the products that their `Factors` have: (start, stop) of the rows, and rank. None where these overlap."""
    found = sorted((*group[0].rows, sum(adapter.rank for adapter in group)) for group in _by_rows(adapters))
    return tuple(found) if all(one[1] <= other[0] for one, other in pairwise(found)) else ()


def packed_bytes(adapters: Sequence[Adapter], dtype: torch.dtype) -> int:
    """What `Factors.in_memory` of them take."""
    factors = sum(a.down.numel() for a in adapters), *(sum(a.up.numel() for a in g) for g in _by_rows(adapters))
    return sum(aligned(elements * dtype.itemsize) for elements in factors)


def _by_rows(adapters: Sequence[Adapter]) -> list[list[Adapter]]:
    found: dict[tuple[int, int], list[Adapter]] = {}
    for adapter in adapters:
        found.setdefault(adapter.rows, []).append(adapter)
    return list(found.values())
