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
from functools import partial
from types import ModuleType
from typing import Any

import torch

from ..gguf.types import BLOCKS, PLAIN, GGMLType
from . import reference

log = logging.getLogger("sluice.quant")

Weight = Callable[[], torch.Tensor]

TRITON_DEVICES = frozenset({"cuda", "xpu"})  # ROCm calls itself cuda

_chosen: dict[str, tuple[ModuleType | None, str]] = {}  # kind of device -> kernels or None, and the reason for it
_failures: dict[tuple[str, GGMLType], str] = {}  # kind of device and type whose kernel does not work -> why


def _choose(kind: str) -> tuple[ModuleType | None, str]:
    if kind not in TRITON_DEVICES:
        return None, f"torch: there are no kernels for {kind}"
    if importlib.util.find_spec("triton") is None:
        return None, "torch: Triton is not installed (on Windows: pip install triton-windows)"
    try:
        from .kernels import launch
    except Exception as error:  # a broken Triton raises anything, and models must load all the same
        return None, f"torch: Triton does not work here ({type(error).__name__}: {error})"
    return launch, "triton"


def _kernels(kind: str, ggml_type: GGMLType) -> Any:
    """The kernels that serve a type on a kind of device, or None: then the reference does."""
    if kind not in _chosen:
        _chosen[kind] = _choose(kind)
        log.info("dequantising on %s with %s", kind, _chosen[kind][1])
    return None if ggml_type in PLAIN or (kind, ggml_type) in _failures else _chosen[kind][0]


# What is the caller's fault, or the device's memory's: another implementation would fail as well.
_NOT_THE_KERNELS = (ValueError, torch.OutOfMemoryError)


def _tried(data: torch.Tensor, ggml_type: GGMLType, kernel: Callable[..., Any], *args: Any) -> Any:
    """`kernel(*args)`, or None when it does not work; then its type is given up on this kind of device."""
    try:
        return kernel(*args)
    except _NOT_THE_KERNELS:
        raise
    except Exception as error:
        _failures[data.device.type, ggml_type] = f"{type(error).__name__}: {error}"
        log.warning("the %s kernel does not work on %s, torch takes over: %s", ggml_type.name, data.device, error)
        return None


def dequantize(data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor of `shape` and `dtype` that the uint8 `data` encodes, on `data`'s device.

    Computed in float32 and rounded once to `dtype`.

    Raises:
        ValueError: the byte count does not fit `shape`, or the type has no dequantiser.
    """
    kernels = _kernels(data.device.type, ggml_type)
    if kernels is not None:
        weight = _tried(data, ggml_type, kernels.dequantize, data, ggml_type, shape, dtype)
        if weight is not None:
            return weight
    return reference.dequantize(data, ggml_type, shape, dtype)


def bind(data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], dtype: torch.dtype) -> Weight:
    """`dequantize` of these very bytes as a call without arguments, cheaper for the host at each call.

    It keeps `data` alive and must be dropped when the weight moves.
    """
    kernels = _kernels(data.device.type, ggml_type)
    if kernels is not None:
        call = _tried(data, ggml_type, kernels.bind, data, ggml_type, shape, dtype)
        if call is not None:
            return call
    return partial(reference.dequantize, data, ggml_type, shape, dtype)


def linear_of_few(
    x: torch.Tensor, data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], bias: torch.Tensor | None
) -> torch.Tensor | None:
    """`x W^T + bias` read straight from the blocks of W, summed in float32, where that is faster; else None.

    It is for few rows of `x` (the modulation layers of a diffusion transformer see one for each picture), for which
    reading the weight is all the work. Nearer to the exact product than a weight rounded to 16 bits gives.
    """
    kernels = _kernels(data.device.type, ggml_type)
    if kernels is None or x.numel() > kernels.KERNELS[ggml_type].few * shape[1] or x.requires_grad:
        return None
    if shape[1] % BLOCKS[ggml_type].elements:
        return None
    return _tried(data, ggml_type, kernels.linear, x, data, ggml_type, shape, bias)


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
