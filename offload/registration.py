"""Let the GPU's copy engine read host memory directly: page-lock it and map it for the device.

The CUDA *driver* is called, not the runtime. A runtime call that fails leaves its error behind in the thread, and
torch's next CUDA call raises it as if it were its own; registering a read-only mapping without the ReadOnly flag is
enough (measured: error 1). The driver keeps no such state, and a refusal here is normal: B300 and RTX PRO 6000
drivers cannot register read-only memory at all, WSL and Windows limit how much may be locked.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import psutil
import torch

from ..loaders.sizes import size
from .errors import NoRoomToLockError, RefusedError

log = logging.getLogger("sluice.offload")

# From cuda.h; the two flags are the same in hip_runtime_api.h.
DEVICEMAP, READ_ONLY = 2, 8
PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES = 100
READ_ONLY_HOST_REGISTER_SUPPORTED = 113


class Registrar(Protocol):
    """Locks memory for one device."""

    def read_only_refusal(self) -> str | None:
        """Why memory that the CPU may only read cannot be registered; None if it can."""

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        """Raises RefusedError with the reason, and then leaves no trace."""

    def unregister(self, address: int) -> None:
        """Undo `register`. No copy from there may be under way."""


class MappingRegistrar(Registrar, Protocol):
    """One that also knows how kernels reach what it registered."""

    def device_address(self, address: int) -> int:
        """Where the device sees registered memory; RefusedError if it cannot."""

    def follows_host_pages(self) -> bool:
        """Whether kernels may read any address of the process, through the CPU's page tables."""


class NoRegistrar:
    """For a device that copies from any memory, and for one that is not CUDA's."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def read_only_refusal(self) -> str | None:
        return self.reason

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        raise RefusedError(self.reason)

    def unregister(self, address: int) -> None:
        raise AssertionError("nothing was registered")

    def device_address(self, address: int) -> int:
        raise RefusedError(self.reason)

    def follows_host_pages(self) -> bool:
        return False


class CudaRegistrar:
    """Registers memory in the device's primary context, the one that torch uses."""

    def __init__(self, driver: ctypes.CDLL, index: int) -> None:
        self._driver, self._index = driver, index
        self._primary: ctypes.c_void_p | None = None

    def read_only_refusal(self) -> str | None:
        error, supported = self._attribute(READ_ONLY_HOST_REGISTER_SUPPORTED)
        if error:
            return f"the driver does not know read-only registration ({self._name(error)})"
        return None if supported else "this driver or GPU cannot register read-only memory"

    def follows_host_pages(self) -> bool:
        error, follows = self._attribute(PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES)
        return not error and bool(follows)

    def _attribute(self, number: int) -> tuple[int, int]:
        """An error or 0, and the value."""
        value = ctypes.c_int(0)
        return self._driver.cuDeviceGetAttribute(ctypes.byref(value), number, self._index), value.value

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        flags = DEVICEMAP | (READ_ONLY if read_only else 0)
        with self._context():
            error = self._driver.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags)
        if error:  # one of several, at a limit of the system's, which is not known before
            raise NoRoomToLockError(f"registering {size(nbytes)} failed ({self._name(error)})")

    def unregister(self, address: int) -> None:
        with self._context():
            error = self._driver.cuMemHostUnregister(ctypes.c_void_p(address))
        if error:
            log.warning(
                "unregistering memory failed: %s; if the GPU was lost, restart ComfyUI", self._name(error)
            )  # the GPU is lost: go on with closing

    def device_address(self, address: int) -> int:
        there = ctypes.c_uint64()
        with self._context():
            error = self._driver.cuMemHostGetDevicePointer_v2(ctypes.byref(there), ctypes.c_void_p(address), 0)
        if error:
            raise RefusedError(f"the GPU cannot see registered memory ({self._name(error)})")
        return there.value

    @contextmanager
    def _context(self) -> Iterator[None]:
        """A thread that has not used CUDA yet has no current context."""
        if self._primary is None:
            # Never given back: the registrations would go with the context, and torch keeps it as well.
            primary = ctypes.c_void_p()
            error = self._driver.cuInit(0) or self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(primary), self._index)
            if error:
                raise RefusedError(f"GPU {self._index} cannot be used ({self._name(error)})")
            self._primary = primary
        self._driver.cuCtxPushCurrent_v2(self._primary)
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _name(self, error: int) -> str:
        text = ctypes.c_char_p()
        self._driver.cuGetErrorName(error, ctypes.byref(text))
        return f"{text.value.decode() if text.value else 'CUDA error'} {error}"


class HipRegistrar:
    """The same through AMD's runtime, which has no driver below it; what fails is taken back from the thread."""

    def __init__(self, runtime: ctypes.CDLL, index: int) -> None:
        self._runtime, self._index = runtime, index
        runtime.hipGetErrorName.restype = ctypes.c_char_p

    def read_only_refusal(self) -> str | None:
        return None  # it has no attribute for that: registering says

    def follows_host_pages(self) -> bool:
        return False  # only with XNACK, which the cards that share memory do not have

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        flags = DEVICEMAP | (READ_ONLY if read_only else 0)
        with torch.cuda.device(self._index):
            error = self._runtime.hipHostRegister(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags)
        if error:
            raise RefusedError(f"registering {size(nbytes)} failed ({self._name(error)})")

    def unregister(self, address: int) -> None:
        with torch.cuda.device(self._index):
            error = self._runtime.hipHostUnregister(ctypes.c_void_p(address))
        if error:
            log.warning("unregistering memory failed: %s; if the GPU was lost, restart ComfyUI", self._name(error))

    def device_address(self, address: int) -> int:
        there = ctypes.c_void_p()
        with torch.cuda.device(self._index):
            error = self._runtime.hipHostGetDevicePointer(ctypes.byref(there), ctypes.c_void_p(address), 0)
        if error:
            raise RefusedError(f"the GPU cannot see registered memory ({self._name(error)})")
        return there.value or 0

    def _name(self, error: int) -> str:
        self._runtime.hipGetLastError()  # else torch's next call would raise it as its own
        return f"{(self._runtime.hipGetErrorName(error) or b'HIP error').decode()} {error}"


def mapping_registrar(device: torch.device) -> MappingRegistrar:
    """As `registrar_for`, and for AMD's GPUs."""
    if device.type == "cuda" and torch.version.hip is not None:
        runtime = _hip_runtime()
        if runtime is None:
            return NoRegistrar("AMD's runtime library was not found in the process")
        return HipRegistrar(runtime, torch.cuda.current_device() if device.index is None else device.index)
    return registrar_for(device)


def registrar_for(device: torch.device) -> CudaRegistrar | NoRegistrar:
    if device.type != "cuda":
        return NoRegistrar(f"memory is registered for CUDA devices only, not for {device.type}")
    if torch.version.cuda is None:
        return NoRegistrar("memory is registered through NVIDIA's driver only")
    driver = _driver()
    if driver is None:
        return NoRegistrar("NVIDIA's driver library was not found")
    return CudaRegistrar(driver, torch.cuda.current_device() if device.index is None else device.index)


@cache
def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


@cache
def _hip_runtime() -> ctypes.CDLL | None:
    """The library that torch loaded, wherever that has it from: a second one would know nothing of torch's memory."""
    loaded = (mapped.path for mapped in psutil.Process().memory_maps() if "amdhip64" in mapped.path)
    path = next(loaded, None)
    return None if path is None else ctypes.CDLL(path)
