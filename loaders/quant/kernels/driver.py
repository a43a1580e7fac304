"""Start a CUDA program of one's own on torch's stream, through the driver and with little Python for each call."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch

from . import nvrtc
from .few_rows import Gpu
from .nvrtc import CudaError

_MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MEMORY_TYPE, _DEVICE_MEMORY = 2, 2  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_MEMORYTYPE_DEVICE
_SHARED_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN


@cache
def library() -> ctypes.CDLL:
    """The driver. Raises: CudaError when there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError as error:
        raise CudaError(f"no CUDA driver: {error}") from error


def checked(status: int, what: str) -> None:
    """Raises: CudaError unless `status` is 0."""
    if status:
        text = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(text))
        raise CudaError(f"{what}: error {status}, {(text.value or b'unknown').decode()}")


@cache
def gpu(index: int) -> Gpu:
    """What a plan must know of torch's device `index`."""
    device, most = ctypes.c_int(), ctypes.c_int()
    checked(library().cuInit(0), "cuInit")
    checked(library().cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    checked(library().cuDeviceGetAttribute(ctypes.byref(most), _SHARED_OPTIN, device), "cuDeviceGetAttribute")
    return Gpu(torch.cuda.get_device_properties(index).multi_processor_count, most.value)


def in_device_memory(address: int) -> bool:
    """Whether CUDA knows `address` as a GPU's memory; a file's mapping that a GPU reads by page tables is not."""
    kind = ctypes.c_uint()
    status = library().cuPointerGetAttribute(ctypes.byref(kind), _MEMORY_TYPE, ctypes.c_uint64(address))
    return status == 0 and kind.value == _DEVICE_MEMORY


@cache
def function(source: str, name: str, definitions: tuple[str, ...], index: int) -> ctypes.c_void_p:
    """Function `name` of cuda/`source`, compiled for and loaded on device `index`, of whose shared memory it may have
    all; loaded for good.

    Raises:
        CudaError: it does not compile or load.
    """
    module, found = ctypes.c_void_p(), ctypes.c_void_p()
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # the device's context is there, and current
        code = nvrtc.compiled(source, definitions, architecture)
        checked(library().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        checked(library().cuModuleGetFunction(ctypes.byref(found), module, name.encode()), "cuModuleGetFunction")
        checked(library().cuFuncSetAttribute(found, _MOST_SHARED, gpu(index).shared), "cuFuncSetAttribute")
    return found


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


_AHEAD = _Attribute(6, (1,))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


_ADDRESSES = struct.Struct("4Q")


class _Call:
    """The structures that one launch is described by; a call of its own for each thread that launches at once."""

    def __init__(
        self, found: ctypes.c_void_p, numbers: Sequence[int], grid: int, threads: int, shared: int, ahead: bool
    ):
        self.addresses = (ctypes.c_uint64 * 4)()
        self.numbers = [ctypes.c_int(number) for number in numbers]
        at = ctypes.addressof(self.addresses)
        values = [at + 8 * i for i in range(4)] + [ctypes.addressof(number) for number in self.numbers]
        pointers = (ctypes.c_void_p * len(values))(*values)
        self.config = _Config((grid, 1, 1), (threads, 1, 1), shared, None, ctypes.pointer(_AHEAD), int(ahead))
        self.arguments = ctypes.byref(self.config), found, pointers, None


def launcher(
    found: ctypes.c_void_p,
    numbers: Sequence[int],
    grid: int,
    threads: int,
    shared: int,
    index: int,
    ahead: bool = False,
) -> Callable[[int, int, int | None, int], None]:
    """A call that starts `found` on the current stream of device `index`, which must be the current one.

    It takes four addresses, the third None for none; `numbers`, ints, follow them in every call.

    Args:
        ahead: the program may begin before the kernel in front of it on the stream has ended; see [Note: Ahead] in
            products.py.

    The call raises CudaError when the driver refuses.
    """
    free: list[_Call] = []  # its `pop` and `append` are atomic
    launch, stream, pack = library().cuLaunchKernelEx, torch._C._cuda_getCurrentRawStream, _ADDRESSES.pack_into

    def start(first: int, second: int, third: int | None, fourth: int) -> None:
        try:
            call = free.pop()
        except IndexError:
            call = _Call(found, numbers, grid, threads, shared, ahead)
        pack(call.addresses, 0, first, second, third or 0, fourth)
        call.config.stream = stream(index)
        status = launch(*call.arguments)
        free.append(call)
        if status:
            checked(status, "cuLaunchKernelEx")

    return start
