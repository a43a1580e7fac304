"""Compiled kernels, kept by what they were compiled for, and started with as little Python as Triton allows.

[Note: Variants]
A program compiles once for each type, data type and alignment (and, to multiply, row length and number of rows of x),
0.1 to 1 s each, and Triton keeps the result on disk. Finding a compiled program again costs Triton more time than a
small tensor takes to dequantise, so they are kept here and started directly. Their number is bounded by what they are
compiled for and by the devices; a model uses a handful.

[Note: Direct]
`CompiledKernel[grid]` asks for the device, the stream and the launch hooks, and CUDA for the attributes of every
pointer. What it calls at last, `run`, has had the same arguments in every Triton from 3.1 to
3.6; in these it is called directly on CUDA. Elsewhere the public way is taken. Hooks of Triton's profiler do not see
a direct launch; CUDA's profilers do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import torch
import triton

DIRECT = torch.version.cuda is not None and triton.__version__.split(".")[:2] in [["3", str(n)] for n in range(1, 7)]

_proven: set[Hashable] = set()  # variants whose bound call was seen to give the bits of the public way
_kept: dict[Hashable, tuple[Any, tuple]] = {}  # variant -> compiled kernel, its arguments after those of the call
_compiling: dict[Hashable, threading.Lock] = {}  # variant -> whoever comes second waits, and finds it kept


def count() -> int:
    """How many variants are kept."""
    return len(_kept)


def start(
    variant: Hashable,
    program: Any,
    programs: int,
    args: tuple,
    constants: Callable[[], tuple],
    warps: int,
    **options: int,
) -> None:
    """Run `programs` of `program` over `args`, a tensor first, on its device and that device's current stream.

    Args:
        variant: all that `program` is compiled for, the device included.
        constants: makes the arguments after `args`; called when the variant is new.
        options: of the compiler, beside the number of warps.
    """
    device = args[0].device
    # Triton launches on torch's current device, whichever device its arguments lie on.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        if variant not in _kept:
            with _compiling.setdefault(variant, threading.Lock()):
                if variant not in _kept:
                    rest = constants()
                    compiled, ran = _first_run(program, (programs, 1, 1), (*args, *rest), num_warps=warps, **options)
                    if compiled is not None:  # Triton's interpreter compiles nothing
                        _kept[variant] = compiled, rest
                    if ran:
                        return
        compiled, rest = _kept[variant]
        if DIRECT and device.type == "cuda":
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in (*args, *rest)]
            compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *given)
        else:
            compiled[(programs, 1, 1)](*args, *rest)


def compile_ahead(
    variant: Hashable,
    program: Any,
    args: tuple,
    constants: Callable[[], tuple],
    warps: int,
    device: torch.device,
    **options: int,
) -> None:
    """Compile a variant and load it onto a CUDA `device`, for a `start` to come; one that comes meanwhile waits for it.

    Args:
        args: as of `start`; of tensors, which may lie on the meta device, only dtypes and addresses are looked at.
    """
    with torch.cuda.device(device), _compiling.setdefault(variant, threading.Lock()):
        if variant not in _kept:
            rest = constants()
            compiled = program.warmup(*args, *rest, grid=(1, 1, 1), num_warps=warps, **options)
            compiled.run  # noqa: B018  (which loads it)
            _kept[variant] = compiled, rest


def _first_run(program: Any, grid: tuple[int, int, int], args: tuple, **options: int) -> tuple[Any, bool]:
    """The compiled program, and whether it ran. Triton refuses a tensor whose address CUDA does not know, as that of a
    file's mapping that the GPU reads through the CPU's page tables; an address it takes as it is."""
    try:
        return program[grid](*args, **options), True
    except ValueError as error:
        if not DIRECT or "cannot be accessed from Triton" not in str(error):
            raise
        return program.warmup(*args, grid=grid, **options), False


def bound(variant: Hashable, programs: int, index: int, last: tuple[int, ...] = ()) -> Callable[..., None] | None:
    """A kept variant with everything but its first arguments filled in, or None: then only `start` can run it.

    The arguments are addresses and integers, of which those in `last` follow what is given; device `index` must be the
    current one.
    """
    if not DIRECT or variant not in _kept:
        return None
    compiled, rest = _kept[variant]
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    stream = torch._C._cuda_getCurrentRawStream
    rest = *last, *(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in rest)  # the tables are never freed
    return lambda *args: run(programs, 1, 1, stream(index), function, packed, None, None, None, *args, *rest)


def proves(variant: Hashable, again: Callable[[], torch.Tensor], expected: torch.Tensor) -> bool:
    """Whether the bound call `again` gives the bits that the public way gave; looked at once for each variant."""
    if variant in _proven:
        return True
    result = again()
    whole = result.numel() * result.element_size() % 4 == 0  # words, for a comparison needs memory for each element
    got, wanted = (t.reshape(-1).view(torch.int32 if whole else torch.uint8) for t in (result, expected))
    if torch.equal(got, wanted):
        _proven.add(variant)
    return variant in _proven
