"""The CUDA C program for few rows: where it is taken, and its launches.

[Note: Ahead] A bound call lets the program begin before the kernel in front of it on the stream has ended (programmatic
dependent launch). What it reads by then is the weight alone; it waits for all that is in front of it before it reads x
or the bias and before it writes anything. That is right as long as no kernel that may still run has written the weight:
- The bytes that a bound call is for stay where they are, and the first call by them is not bound: it waits for the end
  of all that is in front of it, the weight's arrival included, and bound calls begin after it has begun.
- Bytes that come anew to the same place, a page of the dynamic patcher's say, are copied there, not written by a
  kernel. A copy, and a stream's waiting for an event, are no kernels: what comes behind them waits for their end.
- Programs in a row: each waits for the end of the one in front before it writes, so that all before that have ended.
Calls that are not bound wait as every kernel does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...gguf.types import GGMLType
from . import driver, nvrtc
from .few_rows import ROWS, SLICE, Plan

log = logging.getLogger("sluice.quant")

SOURCE, NAME = "few_rows.cu", "few_rows"

# GPUs that it was run on. Later ones have its instructions too, but while a wrong result is noticed, a program that
# never ends could not be recovered from.
MEASURED = frozenset({(9, 0)})

# Types for which it is taken, because it was measured to be faster than Triton's programs: always by weights of more
# than LARGE elements, and by smaller ones, of which reading x is a larger part, from that many rows of x on. That is so
# even if the kernel in front has to end first. The other types of few_rows.TYPES were not run on a GPU yet.
FROM = {
    GGMLType.Q8_0: 2,
    GGMLType.Q4_0: 4,
    GGMLType.Q4_1: 4,
    GGMLType.Q5_0: 4,
    GGMLType.Q2_K: 2,
    GGMLType.Q3_K: 4,
    GGMLType.Q4_K: 4,
    GGMLType.Q5_K: 4,
    GGMLType.Q6_K: 4,
    GGMLType.IQ4_XS: 2,
}
LARGE = 1 << 24
# Types for which eight rows after the other were measured to be faster than a dense weight and cuBLAS, and up to how
# many rows of x, by weights of more than LARGE elements and by smaller ones (benchmarks/results/few_rows_h200.txt).
IN_EIGHTS = frozenset({GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K})
MOST, MOST_OF_SMALLER = 24, 16
SMALLEST = 1 << 23  # elements of a weight for which that was measured

_reasons: dict[int, str | None] = {}


def unavailable(index: int) -> str | None:
    """Why there are no such programs on CUDA device `index`, if so."""
    if index not in _reasons:
        _reasons[index] = _find_out(index)
        if _reasons[index]:
            log.info("few rows are multiplied by Triton's programs on cuda:%d: %s", index, _reasons[index])
    return _reasons[index]


def choices() -> dict[str, str]:
    """Device to what was found out about it."""
    return {
        f"cuda:{index} few rows": f"triton: {why}" if why else f"CUDA C, compiled by NVRTC {nvrtc.version()}"
        for index, why in list(_reasons.items())
    }


def _find_out(index: int) -> str | None:
    if torch.version.hip is not None:
        return "not an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(index)
    if capability not in MEASURED:
        return f"not measured on compute capability {capability[0]}.{capability[1]}"
    try:
        nvrtc.version()
        driver.gpu(index)
    except Exception as error:  # a library without the function raises AttributeError, say
        return f"{type(error).__name__}: {error}"
    return None


def fits(ggml_type: GGMLType, columns: int, data: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the program can multiply such tensors."""
    return (
        columns > 0
        and columns % SLICE == 0
        and x.dtype in (torch.bfloat16, torch.float16)
        and data.data_ptr() % 16 == 0
        and x.data_ptr() % 16 == 0
        and (bias is None or bias.dtype in (torch.float32, x.dtype))
        and x.numel() <= ROWS * columns
    )


@dataclass(frozen=True)
class Product:
    """A launch of the program, as multiply.Launch is one of a Triton program. Attributes: `bias`: 0 none, 1 float32, 2
    as x."""

    plan: Plan
    dtype: torch.dtype
    bias: int
    index: int

    program = SOURCE

    @property
    def variant(self) -> tuple:
        return SOURCE, self.plan, self.bias

    def call(self, ahead: bool) -> Callable[..., None]:
        """A call of addresses: weight, x, bias or None, result. Raises: CudaError; it does not compile."""
        plan = self.plan
        found = driver.function(SOURCE, NAME, plan.definitions(self.dtype, self.dtype), self.index)
        stages, rows = plan.stages_and_rows
        numbers = plan.n, plan.k, plan.m, rows, stages, self.bias
        return driver.launcher(found, numbers, plan.grid, plan.threads, plan.shared, self.index, ahead)

    def start(self, data: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """Raises: CudaError; it does not compile or start."""
        with torch.cuda.device(self.index):
            _unbound(self)(data.data_ptr(), x.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())

    def bound(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> Callable[..., None]:
        """`call` for weights that stay where they are: see [Note: Ahead]."""
        return self.call(ahead=True)


@lru_cache(maxsize=512)
def _unbound(product: Product) -> Callable[..., None]:
    return product.call(ahead=False)


def rows_in_eights(ggml_type: GGMLType, device: torch.device, shape: Sequence[int]) -> int:
    """Up to how many rows of x the program is worth being started for eight after eight, with a weight of `shape`; 0
    where it is not taken."""
    elements = shape[0] * shape[1]
    if device.type != "cuda" or ggml_type not in IN_EIGHTS or elements < SMALLEST:
        return 0
    if unavailable(torch.cuda.current_device() if device.index is None else device.index):
        return 0
    return MOST if elements > LARGE else MOST_OF_SMALLER


def planned(
    ggml_type: GGMLType, shape: Sequence[int], data: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, m: int
) -> Product | None:
    """How `m` rows of x are multiplied by the program, where it is the faster one and can be had."""
    rows, columns = shape
    if data.device.type != "cuda" or ggml_type not in FROM or rows * columns < SMALLEST:
        return None
    if rows * columns <= LARGE and m < FROM[ggml_type]:
        return None
    if not fits(ggml_type, columns, data, x, bias) or unavailable(data.device.index):
        return None
    if not driver.in_device_memory(data.data_ptr()):  # the copies past registers were never tried on other memory
        return None
    plan = Plan(ggml_type, rows, columns, m, driver.gpu(data.device.index))
    kind = 0 if bias is None else 1 if bias.dtype == torch.float32 else 2
    return Product(plan, x.dtype, kind, data.device.index)
