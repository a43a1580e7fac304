"""Which implementation turns quantised bytes into a tensor, decided once per device type, with the reason kept.

Every caller goes through `dequantize` here; nobody else imports a kernel. The plain-torch reference is the
specification and the fallback on every device.
"""

from __future__ import annotations

import torch

from ..gguf.types import GGMLType
from . import reference


def dequantize(data: torch.Tensor, ggml_type: GGMLType, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor of `shape` and `dtype` that the uint8 `data` encodes, on `data`'s device.

    Computed in float32 and rounded once to `dtype`.

    Raises:
        ValueError: the byte count does not fit `shape`, or the type has no dequantiser.
    """
    return reference.dequantize(data, ggml_type, shape, dtype)


def dequantize_rows(
    data: torch.Tensor, ggml_type: GGMLType, row_elements: int, rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Gather `rows` (int64, any shape) of the quantised table `data` and dequantise only those.

    Returns a tensor of shape `rows.shape + (row_elements,)` on `data`'s device.
    """
    return reference.dequantize_rows(data, ggml_type, row_elements, rows, dtype)
