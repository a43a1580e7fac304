"""Multiply a few rows by a quantised weight: which of the programs does it, how it is cut up, and a bound call.

The CUDA C program of products.py is taken on the GPUs, for the types and for the sizes that it is measured to be faster
for. Where it is not, or does not work, matrix.py is taken wherever its instruction is: on NVIDIA's GPUs from compute
capability 8.0 on, for the types that fragments.py knows, x at an address that is a multiple of 16. For more rows
tiles.py would be, for types of tiling.USED; who gives a `config` gets it for any type that tiling.py knows. programs.py
has a program for everything else. What they reach and what binds them is in benchmarks/results: few_rows_h200.txt,
skinny_sweep_h200.txt and skinny_tiles_h200.txt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
import triton

from ...gguf.types import BLOCKS, GGMLType
from . import kept, matrix, products, programs, tiles
from .failures import MismatchError, reason
from .launch import KERNELS, Kernel, alignment, checked_blocks, decoder, dequantize
from .quads import FRAGMENTS, Fragment
from .tiling import TILINGS, USED, Tiling, arguments

log = logging.getLogger("sluice.quant")

SKINNY_ROWS = 8  # rows of x that a program takes at once; `few` says up to how many it is worth it
MANY_ROWS = 6144  # rows of a weight from which on programs that make more of them still fill a GPU

INTERPRETED = not isinstance(matrix.matrix, triton.runtime.JITFunction)

# Which lane has which element is Triton's choice, and the instruction goes by it. What 3.6 and 3.9 make was looked at,
# and a test looks again; where nobody has looked, programs.py does without the instruction.
LANES_KNOWN = triton.__version__.split(".")[:2] in [["3", str(n)] for n in range(6, 10)]

# Programs with matrix instructions that do not work here for a type -> why; others serve it.
_failures: dict[tuple[Any, GGMLType], str] = {}
_right: set[tuple] = set()  # variants of programs with matrix instructions whose first result was looked at
_CHECKED_ROWS = 64  # of the weight: all programs do the same, so more of them tell no more


@cache
def has_matrix_instruction(device: torch.device) -> bool:
    """Whether `device` runs the `mma.sync` of matrix.py. Triton's interpreter can work out what it would do, slowly."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return LANES_KNOWN and nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def by_matrix(ggml_type: GGMLType, device: torch.device) -> bool:
    return ggml_type in FRAGMENTS and (matrix.matrix, ggml_type) not in _failures and has_matrix_instruction(device)


def tiling(ggml_type: GGMLType, device: torch.device, rows: int, m: int) -> Tiling | None:
    """How `m` rows of x are multiplied in tiles by a weight of `rows` rows, where that is faster."""
    known = TILINGS.get(ggml_type) if ggml_type in USED else None
    if known is None or (tiles.tiles, ggml_type) in _failures or not has_matrix_instruction(device):
        return None
    return known if m > (known.large if rows >= MANY_ROWS else known.small).above else None


def few(ggml_type: GGMLType, device: torch.device, shape: Sequence[int]) -> int:
    """Rows of x up to which to multiply by a weight of `shape` is faster than to dequantise and call cuBLAS."""
    if (products.SOURCE, ggml_type) not in _failures and (rows := products.rows_in_eights(ggml_type, device, shape)):
        return rows
    return FRAGMENTS[ggml_type].few if by_matrix(ggml_type, device) else KERNELS[ggml_type].few


def name_of(program: Any) -> str:
    return "CUDA program" if program == products.SOURCE else f"Triton program {program.__name__}"


def choices() -> dict[str, str]:
    """What was decided: what the CUDA program was found to be able to, and programs that were given up, and why."""
    failed = {
        f"few rows, {name_of(program)}, {t.name}": f"another program: it failed: {why}"
        for (program, t), why in list(_failures.items())
    }
    return products.choices() | failed


@dataclass(frozen=True)
class Launch:
    """A program and all that it is started with but its tensors."""

    program: Any
    programs: int
    warps: int
    variant: tuple
    constants: Callable[[], tuple]

    def start(self, data: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        rows = out.shape[-1]
        variant = (*self.variant, *of_tensors(x, bias, out))
        args = data, x, bias, out, rows, out.numel() // rows
        kept.start(variant, self.program, self.programs, args, self.constants, self.warps)

    def bound(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> Callable[..., None] | None:
        """A call of the addresses of weight, x, bias and result, for such tensors; None: there is none."""
        rows = out.shape[-1]
        variant = (*self.variant, *of_tensors(x, bias, out))
        return kept.bound(variant, self.programs, x.device.index, (rows, out.numel() // rows))


def planned(
    ggml_type: GGMLType,
    shape: Sequence[int],
    data: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    m: int,
    config: Any = None,
) -> Launch | products.Product:
    """How `m` rows of `x` are multiplied; `config`: a Kernel, Fragment or Tiling other than the table's, to measure."""
    rows, columns = shape
    if config is None and (products.SOURCE, ggml_type) not in _failures:
        product = products.planned(ggml_type, shape, data, x, bias, m)
        if product is not None:
            return product
    layout = BLOCKS[ggml_type]
    source = alignment(data.data_ptr())
    aligned = x.data_ptr() % 16 == 0
    padded = 1 << (m - 1).bit_length()
    step = padded.bit_length() - 1
    if config is None and aligned:
        config = tiling(ggml_type, x.device, rows, m)
        if config is None and by_matrix(ggml_type, x.device) and FRAGMENTS[ggml_type].cuts[step]:
            config = FRAGMENTS[ggml_type]
    if isinstance(config, Tiling):
        cut = config.large if rows >= MANY_ROWS else config.small

        def tiled() -> tuple:
            return arguments(config, cut, ggml_type, columns, source, INTERPRETED)

        variant: tuple = (tiles.tiles, config, cut, columns, source)
        return Launch(tiles.tiles, -(-rows // (16 * cut.tiles)), cut.warps, variant, tiled)
    if isinstance(config, Fragment):
        warps, unroll = config.cuts[step] or (4, 2)

        def fragment() -> tuple:
            head = config.places, config.decode, config.units, config.minus_zero
            lies = layout.nbytes, layout.elements, gcd(layout.nbytes, source), columns // layout.elements
            return (*head, *lies, padded, warps, unroll, INTERPRETED)

        variant = (matrix.matrix, config, columns, padded, source)
        return Launch(matrix.matrix, -(-rows // (2 * padded)), warps, variant, fragment)
    kernel: Kernel = config or KERNELS[ggml_type]
    per_program = kernel.skinny_rows if rows >= MANY_ROWS else max(1, kernel.skinny_rows // 2)

    def lanes() -> tuple:
        head = decoder(kernel, ggml_type, data, kernel.skinny_per_block)
        return (*head, columns // layout.elements, padded, per_program, kernel.skinny_lanes)

    variant = programs.skinny, kernel, per_program, columns, padded, source, aligned
    return Launch(programs.skinny, -(-rows // per_program), kernel.skinny_lanes // 32, variant, lanes)


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    ggml_type: GGMLType,
    shape: Sequence[int],
    bias: torch.Tensor | None = None,
    config: Kernel | Fragment | Tiling | None = None,
) -> torch.Tensor | None:
    """`x W^T + bias`, reading the quantised bytes of W, once for each SKINNY_ROWS rows of `x`, and nothing else of it;
    None for more rows than are worth it, of which `few` tells.

    Products are summed in float32 and the result is rounded once, so that it is nearer to the exact product than what
    a weight dequantised to bfloat16 or float16 gives.

    Args:
        x: [..., columns] in float32, float16 or bfloat16; the result is [..., rows] in the same.
        data: the bytes of W; `shape` its (rows, columns).
        bias: [rows], of any floating point type.
        config: another configuration than the tables', to measure it.

    Raises:
        MismatchError: shapes that do not fit each other or the bytes, or too many rows of `x`.
        WrongResultError: a `config` was given and what it gives is not the product.
    """
    rows, columns = shape
    checked_blocks(data, ggml_type, shape)
    m = x.numel() // columns if columns else 0
    if x.shape[-1] != columns or columns % BLOCKS[ggml_type].elements or (bias is not None and bias.shape != (rows,)):
        raise MismatchError(
            f"a {ggml_type.name} weight of shape {tuple(shape)} (rows of whole blocks of {BLOCKS[ggml_type].elements}) "
            f"cannot multiply x of shape {tuple(x.shape)}{'' if bias is None else f' with bias {tuple(bias.shape)}'}."
        )
    if m > SKINNY_ROWS:
        return _in_eights(x, data.contiguous(), ggml_type, shape, bias)
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    data, x = data.contiguous(), x.contiguous()
    bias = None if bias is None else bias.contiguous()
    launch = planned(ggml_type, shape, data, x, bias, m, config)
    instructed = launch.program is not programs.skinny
    try:
        launch.start(data, x, bias, out)
        if instructed and (launch.variant, x.dtype) not in _right:
            _look_at(out, x, data, ggml_type, shape, bias)
            _right.add((launch.variant, x.dtype))
    except Exception as error:
        if not instructed or config is not None or isinstance(error, torch.OutOfMemoryError):
            raise
        _failures[launch.program, ggml_type] = reason(error)
        log.warning(
            "the %s that multiplies few rows does not work for %s, another program takes over: %s",
            name_of(launch.program),
            ggml_type.name,
            reason(error),
        )
        return linear(x, data, ggml_type, shape, bias)
    return out


def _in_eights(
    x: torch.Tensor, data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], bias: torch.Tensor | None
) -> torch.Tensor | None:
    """SKINNY_ROWS rows after the other, by the program for which that was measured; None where it does not serve."""
    rows, columns = shape
    whole = x.reshape(-1, columns).contiguous()
    if len(whole) > few(ggml_type, x.device, shape):
        return None
    parts = whole.split(SKINNY_ROWS)
    if not all(isinstance(planned(ggml_type, shape, data, p, bias, len(p)), products.Product) for p in parts):
        return None
    made = [linear(part, data, ggml_type, shape, bias) for part in parts]
    return torch.cat([part for part in made if part is not None]).view(*x.shape[:-1], rows)


class WrongResultError(RuntimeError):
    """A program ran and what it made is not the product."""


def _look_at(
    out: torch.Tensor, x: torch.Tensor, data: torch.Tensor, ggml_type: GGMLType, shape: Sequence[int], bias: Any
) -> None:
    """Compare the first rows with a product in float32, once for each variant of the program.

    The instruction's lanes are Triton's choice, so on a GPU or a Triton that nobody has tried a program may compile
    and be wrong. The bound is a hundredth of the sum of the products' absolute values: a right result, rounded to
    8 bits at worst, is well within, and a wrong lane is far outside.

    Raises:
        WrongResultError: it is not the product.
    """
    rows = min(_CHECKED_ROWS, shape[0])
    head = data.reshape(-1)[: rows * shape[1] // BLOCKS[ggml_type].elements * BLOCKS[ggml_type].nbytes]
    weight, inputs = dequantize(head, ggml_type, (rows, shape[1]), torch.float32), x.float()
    product = torch.nn.functional.linear(inputs, weight, None if bias is None else bias[:rows].float())
    bound = 0.01 * torch.nn.functional.linear(inputs.abs(), weight.abs())
    if bias is not None:
        bound += 0.01 * bias[:rows].float().abs()
    known = bound.isfinite() & (product.abs() < 0.5 * torch.finfo(out.dtype).max)
    if bool((known & ~((out[..., :rows].float() - product).abs() <= bound + 1e-30)).any()):
        raise WrongResultError("its first result was wrong")


def of_tensors(x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> tuple:
    """What Triton compiles for, of the tensors of a product."""
    about_bias = () if bias is None else (bias.dtype, bias.data_ptr() % 16 == 0)
    return (x.device, x.dtype, out.data_ptr() % 16 == 0, *about_bias)


def bind(
    data: torch.Tensor,
    ggml_type: GGMLType,
    shape: Sequence[int],
    bias: torch.Tensor | None,
    otherwise: Callable[[torch.Tensor], torch.Tensor | None],
) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """`linear` by this weight and bias as a call with `x` alone, which costs the host less than half as much.

    It holds `data`, `bias` and their addresses: bind again when the bytes have moved. `otherwise` does what is not
    bound: the first call for each shape and type of x, which it may refuse with None, and x of any other kind.
    """
    columns = shape[1]
    device, index = data.device, data.device.index
    if device.type != "cuda" or not data.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        return otherwise
    source, bias_address = data.data_ptr(), None if bias is None else bias.data_ptr()
    current_device, empty = torch._C._cuda_getDevice, torch.empty_strided
    known: dict[tuple, tuple] = {}

    def first(x: torch.Tensor, key: tuple) -> torch.Tensor | None:
        out = otherwise(x)
        if out is None or out.numel() == 0 or out.data_ptr() % 16 or x.data_ptr() % 16 or not x.is_contiguous():
            return out
        if x.numel() > SKINNY_ROWS * columns:  # several launches, each of which finds its own
            return out
        launch = planned(ggml_type, shape, data, x, bias, x.numel() // columns)
        variant = (*launch.variant, *of_tensors(x, bias, out))
        run = launch.bound(x, bias, out)
        if run is None:
            return out

        def again() -> torch.Tensor:
            result = empty(tuple(out.shape), out.stride(), dtype=x.dtype, device=device)
            run(source, x.data_ptr(), bias_address, result.data_ptr())
            return result

        with torch.cuda.device(index):  # as `call` has it, where this may have been asked for from another
            proven = kept.proves(variant, again, out)
        if proven:
            known[key] = run, tuple(out.shape), out.stride()
        return out

    def call(x: torch.Tensor) -> torch.Tensor | None:
        key = x.shape, x.dtype, x.requires_grad
        found = known.get(key)
        if found is None:
            return first(x, key)
        address = x.data_ptr()
        if address % 16 or not x.is_contiguous() or x.device != device or current_device() != index:
            return otherwise(x)
        run, out_shape, strides = found
        out = empty(out_shape, strides, dtype=x.dtype, device=device)
        run(source, address, bias_address, out.data_ptr())
        return out

    return call
