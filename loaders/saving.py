"""Weights that are made dense only while a file is being written.

The host saves a model through safetensors, which knows no quantised tensor: it would write the blocks under the
dense shape, reading past their end. Like the host's own lazily cast parameters, a `LazyWeight` declares shape and
dtype and is on a device that safetensors must copy from, one weight after the other; the copy is the dense weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _Nowhere:
    """A device that is not the CPU, so that the writer asks for a copy there."""

    type: str = "sluice-lazy"
    index: int = 0


class LazyWeight(torch.nn.Parameter):
    """A parameter without memory.

    Args:
        make: returns the dense weight; called by each `to`.
        shape: what `make` returns has it.
        dtype: likewise.
    """

    def __new__(cls, make: Callable[[], torch.Tensor], shape: Any, dtype: torch.dtype) -> LazyWeight:
        declared = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return super().__new__(cls, declared, requires_grad=False)  # type: ignore[call-arg]

    def __init__(self, make: Callable[[], torch.Tensor], shape: Any, dtype: torch.dtype) -> None:
        self.make = make

    @property
    def device(self) -> Any:  # type: ignore[override]
        return _Nowhere()

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return self.make().to("cpu").contiguous()
