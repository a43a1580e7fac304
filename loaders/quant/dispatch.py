"""Which implementation turns quantised bytes into a tensor: decided once, the reason kept.

    device with a working Triton (CUDA, ROCm, XPU)   the kernels of `kernels/`
    every other device                               the plain-torch reference, which is also the specification

Both give the same bits. A kernel that does not compile or launch is given up for its type on that kind of device,
with the reason, and the reference takes over: slower, never wrong. `choices()` says what was decided and why.

Layers call `dequantize`. What is traced (`torch.compile`) or reached through tensor dispatch goes through the
registered operator `torch.ops.sluice.dequantize`, which is opaque to the compiler; calling it costs microseconds
that an eager layer saves by not doing so.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence

import torch

from ..gguf.types import PLAIN, GGMLType
from . import reference
from .scratch import Scratch

log = logging.getLogger("sluice.quant")

Dequantizer = Callable[[torch.Tensor, GGMLType, Sequence[int], torch.dtype], torch.Tensor]

TRITON_DEVICES = frozenset({"cuda", "xpu"})  # ROCm calls itself cuda

_chosen: dict[str, tuple[Dequantizer, str]] = {}  # kind of device -> implementation and the reason for it
_failures: dict[tuple[str, GGMLType], str] = {}  # kind of device and type whose kernel does not work -> why


def _choose(kind: str) -> tuple[Dequantizer, str]:
    if kind not in TRITON_DEVICES:
        return reference.dequantize, f"torch: there are no kernels for {kind}"
    if importlib.util.find_spec("triton") is None:
        return reference.dequantize, "torch: Triton is not installed (on Windows: pip install triton-windows)"
    try:
        from .kernels import launch
    except Exception as error:  # a broken Triton raises anything, and models must load all the same
        return reference.dequantize, f"torch: Triton does not work here ({type(error).__name__}: {error})"
    return launch.dequantize, "triton"


def _implementation(kind: str) -> Dequantizer:
    if kind not in _chosen:
        _chosen[kind] = _choose(kind)
        log.info("dequantising on %s with %s", kind, _chosen[kind][1])
    return _chosen[kind][0]


def dequantize(data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor of `shape` and `dtype` that the uint8 `data` encodes, on `data`'s device.

    Computed in float32 and rounded once to `dtype`.

    Raises:
        ValueError: the byte count does not fit `shape`, or the type has no dequantiser.
    """
    kind = data.device.type
    chosen = _implementation(kind)
    if chosen is reference.dequantize or ggml_type in PLAIN or (kind, ggml_type) in _failures:
        return reference.dequantize(data, ggml_type, shape, dtype)
    try:
        return chosen(data, ggml_type, shape, dtype)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        _failures[kind, ggml_type] = f"{type(error).__name__}: {error}"
        log.warning("the %s kernel does not work on %s, torch takes over: %s", ggml_type.name, data.device, error)
        return reference.dequantize(data, ggml_type, shape, dtype)


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    ggml_type: GGMLType,
    shape: Sequence[int],
    bias: torch.Tensor | None,
    scratch: Scratch,
) -> torch.Tensor:
    """`x W^T + bias` for the weight W of `shape` (rows, columns) that `data` encodes, in the dtype of `x`."""
    if data.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad):
        weight = reference.dequantize(data, ggml_type, shape, x.dtype, out=scratch.take(shape, x.dtype))
    else:
        weight = dequantize(data, ggml_type, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def dequantize_rows(
    data: torch.Tensor, ggml_type: GGMLType, row_elements: int, rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Gather `rows` (int64, any shape) of the quantised table `data` and dequantise only those.

    Returns a tensor of shape `rows.shape + (row_elements,)` on `data`'s device.
    """
    return reference.dequantize_rows(data, ggml_type, row_elements, rows, dtype)


def choices() -> dict[str, str]:
    """What was decided so far: kind of device, or kind of device and type, to implementation and reason."""
    decided = {kind: why for kind, (_, why) in _chosen.items()}
    return decided | {f"{kind} {t.name}": f"torch: its kernel failed: {why}" for (kind, t), why in _failures.items()}


@torch.library.custom_op("sluice::dequantize", mutates_args=())
def dequantize_op(data: torch.Tensor, ggml_type: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`dequantize` as an operator of torch, for whatever traces."""
    return dequantize(data, GGMLType(ggml_type), shape, dtype)


@dequantize_op.register_fake
def _(data: torch.Tensor, ggml_type: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return data.new_empty(shape, dtype=dtype)
