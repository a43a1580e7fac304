"""Which implementation turns quantised bytes into a tensor: decided once, the reason kept.

    device with a working Triton (CUDA, ROCm, XPU)   the kernels of `kernels/`
    every other device                               the plain-torch reference, which is also the specification

Both give the same bits. A kernel that does not compile or launch is given up for its type on that kind of device,
with the reason, and the reference takes over: slower, never wrong. `choices()` says what was decided and why.

Layers call the functions. What is traced (`torch.compile`) or reached through tensor dispatch goes through the
registered operators `torch.ops.sluice.dequantize` and `.linear_of_few`, which are opaque to the compiler; calling one
costs microseconds that an eager layer saves by not doing so.
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
from .kernels.failures import MismatchError, reason

log = logging.getLogger("sluice.quant")

Weight = Callable[[], torch.Tensor]
Product = tuple[slice, torch.Tensor, torch.Tensor]  # rows, a [R, columns], b [rows, R]

TRITON_DEVICES = frozenset({"cuda", "xpu"})  # ROCm calls itself cuda

_chosen: dict[str, tuple[ModuleType | None, str]] = {}  # kind of device -> kernels or None, and the reason for it
_failures: dict[tuple[str, GGMLType], str] = {}  # kind of device and type whose kernel does not work -> why
_not_few: dict[tuple[str, GGMLType], str] = {}  # the same for the one that multiplies few rows
_not_ahead: dict[tuple[str, GGMLType], str] = {}  # the same for the one that adds LoRAs, compiled before it is used
_too_large: dict[tuple[str, GGMLType], int] = {}  # the least rank for which the kernel that adds LoRAs does not work


def _choose(kind: str) -> tuple[ModuleType | None, str]:
    if kind not in TRITON_DEVICES:
        return None, f"torch: there are no kernels for {kind}"
    if importlib.util.find_spec("triton") is None:
        return None, "torch: Triton is not installed (on Windows: pip install triton-windows)"
    try:
        from . import kernels
        from .kernels import launch, multiply  # noqa: F401  (its modules)
    except Exception as error:  # a broken Triton raises anything, and models must load all the same
        return None, f"torch: Triton does not work here ({type(error).__name__}: {error})"
    return kernels, "triton"


def _kernels(kind: str, ggml_type: GGMLType) -> Any:
    """The kernels that serve a type on a kind of device, or None: then the reference does."""
    if kind not in _chosen:
        _chosen[kind] = _choose(kind)
        log.info("dequantising on %s with %s", kind, _chosen[kind][1])
    return None if ggml_type in PLAIN or (kind, ggml_type) in _failures else _chosen[kind][0]


# What is the caller's fault, or the device's memory's: another implementation would fail as well.
_NOT_THE_KERNELS = (MismatchError, torch.OutOfMemoryError)


def _tried(
    failures: dict[tuple[str, GGMLType], str],
    kernel: Callable[..., Any],
    data: torch.Tensor,
    ggml_type: GGMLType,
    *args: Any,
) -> Any:
    """`kernel(data, ggml_type, *args)`, or None when it does not work; then `failures` has why and its type is given up
    on this kind of device."""
    try:
        return kernel(data, ggml_type, *args)
    except _NOT_THE_KERNELS:
        raise
    except Exception as error:
        failures[data.device.type, ggml_type] = reason(error)
        log.warning(
            "the %s kernel does not work on %s, torch takes over, more slowly; update driver and Triton: %s",
            f"{ggml_type.name} few-row" if failures is _not_few else ggml_type.name,
            data.device,
            reason(error),
        )
        return None


def dequantize(data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor of `shape` and `dtype` that the uint8 `data` encodes, on `data`'s device.

    Computed in float32 and rounded once to `dtype`.

    Raises:
        ValueError: the byte count does not fit `shape`, or the type has no dequantiser.
    """
    kernels = _kernels(data.device.type, ggml_type)
    if kernels is not None:
        weight = _tried(_failures, kernels.launch.dequantize, data, ggml_type, shape, dtype)
        if weight is not None:
            return weight
    return reference.dequantize(data, ggml_type, shape, dtype)


def bind(data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], dtype: torch.dtype) -> Weight:
    """`dequantize` of these very bytes as a call without arguments, cheaper for the host at each call.

    It keeps `data` alive and must be dropped when the weight moves.
    """
    kernels = _kernels(data.device.type, ggml_type)
    if kernels is not None:
        call = _tried(_failures, kernels.launch.bind, data, ggml_type, shape, dtype)
        if call is not None:
            return call
    return partial(reference.dequantize, data, ggml_type, shape, dtype)


def few_elements(kind: str, ggml_type: GGMLType, shape: Sequence[int]) -> int:
    """Up to how many elements of x `linear_of_few` multiplies by a weight of `shape` on a kind of device; -1: none."""
    kernels = _kernels(kind, ggml_type)
    if kernels is None or (kind, ggml_type) in _not_few or shape[1] % BLOCKS[ggml_type].elements:
        return -1
    return kernels.multiply.few(ggml_type, torch.device(kind), shape) * shape[1]


def linear_of_few(
    x: torch.Tensor, data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], bias: torch.Tensor | None
) -> torch.Tensor | None:
    """`x W^T + bias` read straight from the blocks of W, summed in float32, where that is faster; else None.

    It is for few rows of `x` (the modulation layers of a diffusion transformer see one for each picture), for which
    reading the weight is all the work. Nearer to the exact product than a weight rounded to 16 bits gives.
    """
    if x.numel() > few_elements(data.device.type, ggml_type, shape) or x.requires_grad:
        return None
    kernels = _kernels(data.device.type, ggml_type)

    def product(data: torch.Tensor, ggml_type: GGMLType) -> torch.Tensor | None:
        return kernels.multiply.linear(x, data, ggml_type, shape, bias)

    return _tried(_not_few, product, data, ggml_type)


def bind_linear(
    data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor | None] | None:
    """`linear_of_few` by these very bytes and bias as a call with x alone, cheaper for the host; None: it never serves.

    The call answers None where `linear_of_few` does. It keeps `data` and `bias` alive and must be dropped when either
    moves.
    """
    kind = data.device.type
    if few_elements(kind, ggml_type, shape) < 0:
        return None

    def unbound(x: torch.Tensor) -> torch.Tensor | None:
        return linear_of_few(x, data, ggml_type, shape, bias)

    return _kernels(kind, ggml_type).multiply.bind(data, ggml_type, shape, bias, unbound)


def dequantize_with_products(
    data: torch.Tensor,
    ggml_type: GGMLType,
    shape: Sequence[int],
    products: Sequence[Product],
) -> torch.Tensor | None:
    """`dequantize` with b a added to some rows before the one rounding, where there is a kernel for that; else None.

    Args:
        products: (rows, a [R, columns], b [rows, R]) in the dtype of the result; their rows do not overlap.
    """
    return _with_products(data, ggml_type, shape, products, bind=False)


def bind_with_products(
    data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], products: Sequence[Product]
) -> Weight | None:
    """`dequantize_with_products` of these very tensors as a call without arguments, cheaper for the host; else None.

    It keeps neither `data` nor the products alive, which its caller has to do.
    """
    return _with_products(data, ggml_type, shape, products, bind=True)


def adds_products(kind: str, ggml_type: GGMLType, shape: Sequence[int], dtype: torch.dtype, rank: int) -> bool:
    """Whether `dequantize_with_products` has a kernel for such weights and products of that rank at most."""
    if _kernels(kind, ggml_type) is None:
        return False
    from .kernels import folded  # needs Triton, as the kernels do

    most = min(folded.MAX_RANK, _too_large.get((kind, ggml_type), folded.MAX_RANK + 1) - 1)
    return rank <= most and folded.fits(ggml_type, shape, dtype)


def compile_with_products(
    ggml_type: GGMLType,
    shape: Sequence[int],
    dtype: torch.dtype,
    parts: Sequence[tuple[slice, int]],
    device: torch.device,
) -> None:
    """Have the kernel at hand that `dequantize_with_products` will ask for on a CUDA `device`, if there is one: what it
    raises otherwise, this raises, and nothing is given up.

    Args:
        parts: rows and rank of each product.
    """
    if adds_products(device.type, ggml_type, shape, dtype, max(rank for _, rank in parts)):
        from .kernels import folded

        try:
            folded.compile_ahead(ggml_type, shape, dtype, parts, device)
        except Exception as error:
            _not_ahead[device.type, ggml_type] = reason(error)
            raise
        _not_ahead.pop((device.type, ggml_type), None)


def _with_products(
    data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], products: Sequence[Product], bind: bool
) -> Any:
    kind, rank = data.device.type, max(len(a) for _, a, _ in products)
    if not adds_products(kind, ggml_type, shape, products[0][1].dtype, rank):
        return None
    from .kernels import folded

    try:
        return (folded.bind if bind else folded.dequantize_rows)(data, ggml_type, shape, products)
    except _NOT_THE_KERNELS:
        raise
    except Exception as error:  # too large for this GPU, say; the weight is made without it then
        _too_large[kind, ggml_type] = rank
        log.warning(
            "the kernel that adds LoRAs to %s weights does not work on %s from rank %d on, torch adds them more "
            "slowly: %s",
            ggml_type.name,
            data.device,
            rank,
            reason(error),
        )
        return None


def choices() -> dict[str, str]:
    """What was decided so far: kind of device, or kind of device and type, to implementation and reason; and what
    multiplies few rows."""
    chosen, failures = list(_chosen.items()), list(_failures.items())  # another thread may be adding to them
    decided = {kind: why for kind, (_, why) in chosen}
    decided |= {f"{kind} {t.name}": f"torch: its kernel failed: {why}" for (kind, t), why in failures}
    few = list(_not_few.items())
    decided |= {f"{kind} {t.name} few rows": f"dequantised: their kernel failed: {why}" for (kind, t), why in few}
    late = list(_not_ahead.items())
    decided |= {f"{kind} {t.name} LoRA": f"its kernel was not compiled ahead: {why}" for (kind, t), why in late}
    for _, (kernels, _) in chosen:
        if kernels is not None:
            decided |= kernels.launch.dependent.choices() | kernels.multiply.choices()
    return decided


def kept_kernels() -> int:
    """How many compiled kernels are kept, for all devices together."""
    modules = {kernels for kernels, _ in list(_chosen.values()) if kernels is not None}
    return sum(kernels.launch.kept.count() for kernels in modules)


# Defined by schema, because what `torch.library.custom_op` wraps around a function costs 15 us at every call.
torch.library.define(
    "sluice::dequantize",
    "(Tensor data, int ggml_type, SymInt[] shape, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "sluice::linear_of_few",
    "(Tensor x, Tensor data, int ggml_type, SymInt[] shape, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sluice::dequantize", "CompositeExplicitAutograd")
def _dequantize(data: torch.Tensor, ggml_type: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return dequantize(data, GGMLType(ggml_type), shape, dtype)


@torch.library.register_fake("sluice::dequantize")
def _(data: torch.Tensor, ggml_type: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return data.new_empty(shape, dtype=dtype)


@torch.library.impl("sluice::linear_of_few", "CompositeExplicitAutograd")
def _linear_of_few(
    x: torch.Tensor, data: torch.Tensor, ggml_type: int, shape: Sequence[int], bias: torch.Tensor | None
) -> torch.Tensor:
    result = linear_of_few(x, data, GGMLType(ggml_type), shape, bias)
    if result is None:  # the kernel failed since this was traced
        weight = dequantize(data, GGMLType(ggml_type), shape, x.dtype)
        result = torch.nn.functional.linear(x, weight, bias)
    return result


@torch.library.register_fake("sluice::linear_of_few")
def _(
    x: torch.Tensor, data: torch.Tensor, ggml_type: int, shape: Sequence[int], bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


# The functions of these names, for whatever traces; they have no derivative. The second must not be traced for an x
# that has more than `few_elements`.
dequantize_op = torch.ops.sluice.dequantize.default
linear_of_few_op = torch.ops.sluice.linear_of_few.default
