"""GGUF blocks as one layout of the host's own `QuantizedTensor`.

ComfyUI moves, sizes, pins, prefetches and streams a `QuantizedTensor` natively, so a GGUF weight is one: its
`_qdata` are the file's bytes as they are (uint8, `[rows, bytes per row]` where the rows are whole blocks, else
flat), its logical shape and compute dtype live in the params, its scales inside the blocks. A subclass would be
lost (the host rebuilds the base class when it copies), so everything of ours is in the layout.

Handlers cover what the host does to weights: linear and its decompositions, transposition, slices of rows. Any
other operation makes the host dequantise the whole tensor and say so at debug level on the logger
`comfy_kitchen.tensor.base`; our tests fail when it does.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class, register_layout_op

from ..gguf.types import BLOCKS, GGMLType
from .dispatch import dequantize_op, few_elements, linear_of_few_op

LAYOUT = "SluiceGGUFLayout"


@dataclass(frozen=True)
class GGUFParams:
    """What the bytes mean. No tensor fields: a block carries its own scales.

    Args:
        orig_dtype: the compute dtype, what `dequantize()` returns and `.dtype` reports.
        orig_shape: the logical shape, row-major.
        ggml_type: how the blocks are encoded.
        transposed: the logical tensor is the transpose of the stored one (2-D only).
    """

    orig_dtype: torch.dtype
    orig_shape: tuple[int, ...]
    ggml_type: GGMLType
    transposed: bool = False

    def _tensor_fields(self) -> list[str]:
        return []

    def to_device(self, device: torch.device) -> GGUFParams:
        return self

    def clone(self) -> GGUFParams:
        return self

    def copy_from(self, src: GGUFParams, non_blocking: bool = False) -> None:
        """The host copies the bytes; the meaning must agree already."""
        if (src.ggml_type, src.orig_shape) != (self.ggml_type, self.orig_shape):
            raise ValueError(
                f"cannot copy a {src.ggml_type.name} tensor {src.orig_shape} into a {self.ggml_type.name} "
                f"tensor {self.orig_shape}"
            )


class GGUFLayout(QuantizedLayout):
    """The host's interface to GGUF blocks."""

    Params = GGUFParams

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, GGUFParams]:
        raise NotImplementedError(
            "a GGUF weight is never requantised: patches are applied to the dequantised weight at each use"
        )

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: GGUFParams) -> torch.Tensor:
        # The host transposes the result itself when `transposed` is set, and expects the stored shape here.
        shape = params.orig_shape[::-1] if params.transposed else params.orig_shape
        return dequantize_op(qdata, params.ggml_type, shape, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: GGUFParams) -> dict[str, torch.Tensor]:
        return {"": qdata}


register_layout_class(LAYOUT, GGUFLayout)


def quantized(
    data: torch.Tensor, ggml_type: GGMLType, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    """Wrap the uint8 `data` (not copied) as a weight of logical `shape` that computes in `dtype`.

    Raises:
        ValueError: `data` does not hold exactly the blocks of `shape`.
    """
    layout = BLOCKS[ggml_type]
    count = prod(shape)
    if count % layout.elements or data.numel() != count // layout.elements * layout.nbytes:
        raise ValueError(f"{data.numel()} bytes cannot hold a {ggml_type.name} tensor of shape {tuple(shape)}")
    rows = shape[0] if len(shape) > 1 and (count // shape[0]) % layout.elements == 0 else 1
    return QuantizedTensor(data.view(rows, -1), LAYOUT, GGUFParams(dtype, tuple(shape), ggml_type))


def is_gguf(tensor: object) -> TypeGuard[QuantizedTensor]:
    """Whether `tensor` is a quantised GGUF weight."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT


def with_params(tensor: QuantizedTensor, **changes: Any) -> QuantizedTensor:
    """The same bytes under changed params (`orig_dtype`, `orig_shape`)."""
    return QuantizedTensor(tensor._qdata, LAYOUT, dataclasses.replace(tensor._params, **changes))


def reshaped(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The same bytes under another shape of as many elements."""
    return with_params(tensor, orig_shape=shape) if is_gguf(tensor) else tensor.view(shape)


def dense(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` as a plain tensor of `dtype`: dequantised with a single rounding, or cast."""
    if not is_gguf(tensor):
        return tensor.to(dtype)
    params = tensor._params
    if params.transposed:
        return dequantize_op(tensor._qdata, params.ggml_type, params.orig_shape[::-1], dtype).t()
    return dequantize_op(tensor._qdata, params.ggml_type, params.orig_shape, dtype)


def rows_of(tensor: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Rows `start` to `stop` (dimension 0) as a view of the same bytes.

    Raises:
        ValueError: the rows are not whole blocks, or the tensor is transposed.
    """
    params = tensor._params
    if params.transposed or tensor._qdata.shape[0] != params.orig_shape[0]:
        raise ValueError(f"rows of a {params.ggml_type.name} tensor {params.orig_shape} are not whole blocks")
    shape = (stop - start, *params.orig_shape[1:])
    return QuantizedTensor(tensor._qdata[start:stop], LAYOUT, dataclasses.replace(params, orig_shape=shape))


@register_layout_op(torch.ops.aten.linear.default, GGUFLayout)
def _linear(qt: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    params = weight._params
    # The compiler plans for the result of a matrix product of torch better than for that of an operator of ours.
    few = -1 if params.transposed else few_elements(x.device.type, params.ggml_type, params.orig_shape)
    if x.numel() <= few and not (torch.is_grad_enabled() and x.requires_grad):
        return linear_of_few_op(x, weight._qdata, params.ggml_type, params.orig_shape, bias)
    return torch.nn.functional.linear(x, dense(weight, x.dtype), bias)


@register_layout_op(torch.ops.aten.mm.default, GGUFLayout)
def _mm(qt: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    a, b = args
    return torch.mm(dense(a, b.dtype) if is_gguf(a) else a, dense(b, a.dtype) if is_gguf(b) else b)


@register_layout_op(torch.ops.aten.addmm.default, GGUFLayout)
def _addmm(qt: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    bias, a, b = args
    return torch.addmm(bias, a, dense(b, a.dtype), **kwargs)


@register_layout_op(torch.ops.aten.t.default, GGUFLayout)
def _t(qt: QuantizedTensor, args: tuple, kwargs: dict) -> QuantizedTensor:
    params = qt._params
    return with_params(qt, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)


@register_layout_op(torch.ops.aten.to.device, GGUFLayout)
def _to(qt: QuantizedTensor, args: tuple, kwargs: dict) -> QuantizedTensor:
    """`weight.to(x)` in inference mode, which is how the host prepares a table of words to be multiplied by."""
    weight, device, dtype = args[:3]
    return weight.to(device=device).to(dtype=dtype)


@register_layout_op(torch.ops.aten.slice.Tensor, GGUFLayout)
def _slice(qt: QuantizedTensor, args: tuple, kwargs: dict) -> torch.Tensor:
    dim, start, stop, step = args[1:] + (0, None, None, 1)[len(args) - 1 :]
    size = qt.shape[dim]
    start, stop, _ = slice(start, stop).indices(size)
    rows_are_blocks = not qt._params.transposed and qt._qdata.shape[0] == qt._params.orig_shape[0]
    if dim == 0 and step == 1 and rows_are_blocks:
        return rows_of(qt, start, max(start, stop))
    if (start, stop, step) == (0, size, 1):
        return qt
    return torch.ops.aten.slice.Tensor(qt.dequantize(), dim, start, stop, step)
