"""How few_rows.cu is cut up, compiled by NVRTC and started: what few_rows_cuda.py measures.

NVRTC comes with torch's CUDA wheels, so no compiler is needed; the programs are started through the driver, on torch's
stream. Nothing here needs Triton. `Plan` is plain arithmetic, which the test without a GPU uses too.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import repeat
from math import ceil
from pathlib import Path
from typing import Any

import torch
from pack.loaders.gguf.types import BLOCKS, GGMLType

SOURCE = Path(__file__).with_name("few_rows.cu")
SLICE = 256  # columns of a warp
ROWS = 8  # of x, at most
HEAD = 1024  # bytes of shared memory for barriers, and the tiles and stages that these are enough for
TILES, STAGES = 100, 14
HOPPER = 200 * 1024  # a program may have more shared memory only where there are clusters

# Types by how many words a lane reads at once, which is what rows must not share banks for.
TYPES = {
    GGMLType.Q8_0: 1,
    GGMLType.Q4_0: 1,
    GGMLType.Q4_K: 2,
    GGMLType.Q6_K: 1,
    GGMLType.Q5_K: 2,
    GGMLType.Q5_0: 1,
    GGMLType.Q4_1: 1,
    GGMLType.Q5_1: 1,
}


@dataclass(frozen=True)
class Cut:
    """Attributes:
    warps: of a program that multiply, at most; a program has two more, one copies and one sums up.
    stages: tiles of 16 rows, or parts of rows, that a program has room for, at most.
    programs: for each multiprocessor.
    split: programs that share the columns of the same rows, 1, 2, 4 or 8, which needs compute capability 9.0; 0 to
        choose: as many as there are goes over the tiles, where that leaves a program few rows.
    without: 1 copies, 2 arithmetic: to see what binds.
    ahead: 1 to let a program start, and copy the weight, before the kernel in front of it has ended: compute
        capability 9.0, and only where that kernel does not write the weight.
    """

    warps: int = 12
    stages: int = 4
    programs: int = 1
    split: int = 0
    without: int = 0
    ahead: int = 0


@dataclass(frozen=True)
class Plan:
    """A product of `m` rows of x by a weight of `n` rows and `k` columns on a GPU of `multiprocessors`, of whose shared
    memory a program may have `limit` bytes."""

    ggml_type: GGMLType
    n: int
    k: int
    m: int
    cut: Cut
    multiprocessors: int
    limit: int

    def __post_init__(self) -> None:
        if self.ggml_type not in TYPES or self.k % SLICE or not 0 < self.m <= ROWS or not self.n:
            raise ValueError(
                f"{self.m} rows of x times {self.n} x {self.k} of {self.ggml_type.name}: there is a program for "
                f"1 to {ROWS} rows, columns in {SLICE}s, and " + ", ".join(t.name for t in TYPES)
            )

    @property
    def slice_bytes(self) -> int:
        layout = BLOCKS[self.ggml_type]
        return SLICE // layout.elements * layout.nbytes

    @cached_property
    def split(self) -> int:
        goes = ceil(self.k / SLICE / self.cut.warps)
        if self.cut.split or goes == 1 or self.n > 64 * self.multiprocessors or self.limit < HOPPER:
            return self.cut.split or 1
        return min(8, 1 << (goes.bit_length() - 1))

    @cached_property
    def groups(self) -> int:
        """Programs, or clusters of them, that run at once. A cluster lies on some of a group of 16 or 18
        multiprocessors, so that of clusters of four there is one less than one would think."""
        return max(1, self.multiprocessors * self.cut.programs // self.split - (self.split > 2))

    @cached_property
    def warps(self) -> int:
        """As few as need not go over the tiles more often, and no more than there is shared memory for."""
        slices = ceil(self.k / SLICE / self.split)
        tiles = ceil(self.n / self.groups / 16)
        fitting = 1
        for goes in range(ceil(slices / self.cut.warps), slices + 1):
            fitting = ceil(slices / goes)
            if self._shared(2, min(tiles, TILES), fitting) <= self._room:
                break
        return fitting

    @property
    def _room(self) -> int:
        return self.limit // self.cut.programs - (1024 if self.cut.programs > 1 else 0)

    @property
    def pitch(self) -> int:
        return self._pitch(self.warps)

    def _pitch(self, warps: int) -> int:
        """From a row of a stage to the next: a multiple of 16 that takes the rows to different banks."""
        sixteens = ceil(warps * self.slice_bytes / 16) + (self.slice_bytes % 16 != 0)
        return 16 * (sixteens + (1 - sixteens % 2 if TYPES[self.ggml_type] == 1 else (2 - sixteens) % 4))

    def _shared(self, stages: int, tiles: int, warps: int) -> int:
        portion, spread, groups = (128, 80, 16) if self.ggml_type is GGMLType.Q6_K else (64, 48, 8)
        scratch = max(8 * (portion * 2 + 16), 16 * spread)
        zeros = 0 if self.ggml_type in (GGMLType.Q4_K, GGMLType.Q5_K) else groups * 64
        sums = tiles * ceil(self.m / 2) * 128
        return HEAD + stages * 16 * self._pitch(warps) + warps * (scratch + zeros + sums)

    @cached_property
    def stages_and_rows(self) -> tuple[int, int]:
        """Stages, as many as there is room for, and rows of the weight for a program."""
        rows = ceil(self.n / self.groups)
        for stages in range(min(self.cut.stages, STAGES), 1, -1):
            if ceil(rows / 16) <= TILES and self._shared(stages, ceil(rows / 16), self.warps) <= self._room:
                return stages, rows
        tiles = min(ceil(rows / 16), TILES)  # more programs than run at once, then
        while tiles and self._shared(2, tiles, self.warps) > self._room:
            tiles -= 1
        if not tiles:
            raise ValueError(f"{self} does not fit into shared memory")
        return 2, tiles * 16

    @property
    def shared(self) -> int:
        stages, rows = self.stages_and_rows
        return self._shared(stages, ceil(rows / 16), self.warps)

    @property
    def grid(self) -> int:
        return ceil(self.n / self.stages_and_rows[1]) * self.split

    @property
    def threads(self) -> int:
        return (self.warps + 2) * 32

    def definitions(self, x: torch.dtype, out: torch.dtype) -> tuple[str, ...]:
        """What the source is compiled with, for the types of x, bfloat16 or float16, and of the result."""
        facts = {
            "TYPE": int(self.ggml_type),
            "X_IS_F16": int(x == torch.float16),
            "OUT_IS_F32": int(out == torch.float32),
            "WARPS": self.warps,
            "PITCH": self.pitch,
            "PROGRAMS": self.cut.programs,
            "SPLIT": self.split,
            "WITHOUT": self.cut.without,
            "AHEAD": self.cut.ahead,
        }
        return tuple(f"-D{name}={value}" for name, value in facts.items())


class CudaError(RuntimeError):
    """NVRTC or the driver refused."""


@cache
def nvrtc() -> ctypes.CDLL:
    """NVRTC as it comes with torch.

    Raises:
        CudaError: there is none.
    """
    major = (torch.version.cuda or "12").split(".")[0]
    names = [f"libnvrtc.so.{major}", "libnvrtc.so"] if sys.platform != "win32" else [f"nvrtc64_{major}0_0.dll"]
    site = Path(torch.__file__).parents[1] / "nvidia"
    names += [str(path) for path in sorted(site.glob(f"*/lib/libnvrtc.so.{major}"))]
    reasons = []
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
    raise CudaError("no NVRTC: " + "; ".join(reasons))


_ahead: dict[tuple[tuple[str, ...], str], bytes] = {}  # what `compile_ahead` has made


def compiled(definitions: tuple[str, ...], architecture: str) -> bytes:
    """Machine code for `architecture`, such as sm_90.

    Raises:
        CudaError: with the compiler's complaints.
    """
    if (definitions, architecture) in _ahead:
        return _ahead[definitions, architecture]
    rtc = nvrtc()
    program = ctypes.c_void_p()
    source = SOURCE.read_bytes()
    rtc.nvrtcCreateProgram(ctypes.byref(program), source, SOURCE.name.encode(), 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    options += [b"--include-path=" + os.fsencode(SOURCE.parent), *(d.encode() for d in definitions)]
    failed = rtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    try:
        if failed:
            rtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            complaints = ctypes.create_string_buffer(size.value)
            rtc.nvrtcGetProgramLog(program, complaints)
            raise CudaError(f"{SOURCE.name} {' '.join(definitions)}: {complaints.value.decode(errors='replace')}")
        rtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        rtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        rtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")


def checked(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise CudaError(f"{what}: error {status}, {(text.value or b'unknown').decode()}")


@cache
def function(definitions: tuple[str, ...], device: int) -> ctypes.c_void_p:
    """The program, loaded on `device` and allowed all of a program's shared memory."""
    module, found = ctypes.c_void_p(), ctypes.c_void_p()
    code = compiled(definitions, architecture_of(device))
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # the device's context is there, and current
        checked(driver().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        checked(driver().cuModuleGetFunction(ctypes.byref(found), module, b"few_rows"), "cuModuleGetFunction")
        most_shared = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver().cuFuncSetAttribute(found, most_shared, facts(device)[1]), "shared memory")
    return found


def compile_ahead(variants: set[tuple[str, ...]], architecture: str) -> None:
    """Compile them in as many processes as there are cores, for NVRTC does one at a time in each. Complaints come when
    a variant is used."""
    if "fork" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("fork")  # they do not touch the device
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            for definitions, code in zip(variants, pool.map(_or_nothing, variants, repeat(architecture)), strict=True):
                if code:
                    _ahead[definitions, architecture] = code


def _or_nothing(definitions: tuple[str, ...], architecture: str) -> bytes | None:
    try:
        return compiled(definitions, architecture)
    except CudaError:
        return None


def architecture_of(device: int) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def facts(device: int) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have."""
    most = ctypes.c_int()
    asked = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    checked(driver().cuDeviceGetAttribute(ctypes.byref(most), asked, device), "cuDeviceGetAttribute")
    return torch.cuda.get_device_properties(device).multi_processor_count, most.value


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with a number for a value, which may have up to 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("value", ctypes.c_int64 * 8))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_STARTS_AHEAD = _Attribute(6, (1,))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Product:
    """`x W^T + bias` for one weight: `call(x)` with x [m, k] of bfloat16 or float16, m up to 8.

    Args:
        data: the bytes of W, uint8, contiguous, at a multiple of 16; `shape` its (n, k), k a multiple of 256.
        bias: [n], float32 or of x's type.

    Raises:
        ValueError: there is no program for that; CudaError: it does not compile or start.
    """

    def __init__(
        self,
        data: torch.Tensor,
        ggml_type: GGMLType,
        shape: tuple[int, int],
        cut: Cut,
        bias: torch.Tensor | None = None,
    ) -> None:
        if data.data_ptr() % 16 or not data.is_contiguous():
            raise ValueError("the weight's bytes must be contiguous and begin at a multiple of 16")
        self._data, self._type, self._shape, self._cut, self._bias = data, ggml_type, shape, cut, bias
        self._device = data.device.index
        self._known: dict[tuple[int, torch.dtype, torch.dtype], tuple[ctypes.c_void_p, Plan]] = {}

    def _launch(self, m: int, x: torch.dtype, out: torch.dtype) -> tuple[ctypes.c_void_p, Plan]:
        found = self._known.get((m, x, out))
        if found is None:
            plan = Plan(self._type, *self._shape, m, self._cut, *facts(self._device))
            code = function(plan.definitions(x, out), self._device)
            found = self._known[m, x, out] = code, plan
        return found

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`out`: [m, n], contiguous, as x or float32."""
        n, k = self._shape
        m = x.numel() // k
        if x.dtype not in (torch.bfloat16, torch.float16) or x.data_ptr() % 16 or not x.is_contiguous():
            raise ValueError("x must be bfloat16 or float16, contiguous, at a multiple of 16")
        out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device) if out is None else out
        code, plan = self._launch(m, x.dtype, out.dtype)
        stages, rows = plan.stages_and_rows
        bias, bias_is = (None, 0) if self._bias is None else (self._bias, 1 if self._bias.dtype == torch.float32 else 2)
        values: list[Any] = [ctypes.c_void_p(self._data.data_ptr()), ctypes.c_void_p(x.data_ptr())]
        values += [ctypes.c_void_p(None if bias is None else bias.data_ptr()), ctypes.c_void_p(out.data_ptr())]
        values += [ctypes.c_int(value) for value in (n, k, m, rows, stages, bias_is)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = torch.cuda.current_stream(x.device).cuda_stream
        attributes, count = ctypes.pointer(_STARTS_AHEAD), plan.cut.ahead
        config = _Config((plan.grid, 1, 1), (plan.threads, 1, 1), plan.shared, stream, attributes, count)
        status = driver().cuLaunchKernelEx(ctypes.byref(config), code, pointers, None)
        checked(status, "cuLaunchKernelEx")
        return out


def bound(ggml_type: GGMLType, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """How far a product of `x` [m, k] and `w` [n, k], float64, may be from the exact one before it is rounded: [m, n].

    A sum of float32 errs by 2^-23 (the matrix instruction cuts off) of the magnitudes that go into it for each of its
    k + 3 additions. Those are |w| |x|, but integers are too large by the zero point. A group holds both a large and a
    small integer, so what goes into its sum is at most three times its largest |w| for each |x|. To be safe that of the
    row is taken. What the zero point of 128 adds for eight bits is within that too. The minima of superblocks meet sums
    of x that are two bfloat16, which err by 2^-17.
    """
    magnitude = x.abs().sum(-1, keepdim=True) * w.abs().amax(1)
    return magnitude * 3 * ((x.shape[-1] + 3) * 2.0**-23 + 2.0**-17)
