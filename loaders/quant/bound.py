"""What a layer does with a quantised weight that stays where it is, prepared once.

A sampling step of few tokens waits for Python. What depends on the weight alone (the kernel, its address, its grid) is
therefore found out once and not at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import dispatch


class BoundWeight:
    """Holds one weight, which must not move as long as this is used.

    Args:
        weight: quantised, in memory that a kernel can read, as the layer or a page of the dynamic patcher holds it.
        dtype: of the inputs, and of the dense weight.
    """

    __slots__ = ("_bias", "_dense", "_few", "_multiply", "dtype", "weight")

    def __init__(self, weight: Any, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self._few = dispatch.few_elements(
            weight._qdata.device.type, weight._params.ggml_type, weight._params.orig_shape
        )
        self._dense: dispatch.Weight | None = None
        self._multiply: Callable[[torch.Tensor], torch.Tensor | None] | None = None
        self._bias: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied layer binds for itself: what is bound here may be device memory that only its owner can copy."""

    def dense(self) -> torch.Tensor:
        """A new tensor of the weight's shape, in `dtype`."""
        if self._dense is None:
            params = self.weight._params
            self._dense = dispatch.bind(self.weight._qdata, params.ggml_type, params.orig_shape, self.dtype)
        return self._dense()

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x W^T + bias`, without the dense weight where x has few rows."""
        if x.numel() <= self._few:
            result = self._by_blocks(x, bias)
            if result is not None:
                return result
        return torch.nn.functional.linear(x, self.dense(), bias)

    def _by_blocks(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        data, params = self.weight._qdata, self.weight._params
        if self._multiply is None:
            self._multiply, self._bias = dispatch.bind_linear(data, params.ggml_type, params.orig_shape, bias), bias
        if self._multiply is None or self._bias is not bias:  # a bias that is cast at each call, or was replaced
            return dispatch.linear_of_few(x, data, params.ggml_type, params.orig_shape, bias)
        return self._multiply(x)
