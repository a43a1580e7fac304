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

import torch

from .errors import RefusedError

log = logging.getLogger("sluice.offload")

# From cuda.h.
DEVICEMAP, READ_ONLY = 2, 8
READ_ONLY_HOST_REGISTER_SUPPORTED = 113


class Registrar(Protocol):
    """Locks memory for one device."""

    def read_only_refusal(self) -> str | None:
        """Why memory that the CPU may only read cannot be registered; None if it can."""

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        """Raises RefusedError with the reason, and then leaves no trace."""

    def unregister(self, address: int) -> None:
        """Undo `register`. No copy from there may be under way."""


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


class CudaRegistrar:
    """Registers memory in the device's primary context, the one that torch uses."""

    def __init__(self, driver: ctypes.CDLL, index: int) -> None:
        self._driver, self._index = driver, index
        self._primary: ctypes.c_void_p | None = None

    def read_only_refusal(self) -> str | None:
        supported = ctypes.c_int(0)
        attribute = READ_ONLY_HOST_REGISTER_SUPPORTED
        error = self._driver.cuDeviceGetAttribute(ctypes.byref(supported), attribute, self._index)
        if error:
            return f"the driver does not know read-only registration ({self._name(error)})"
        return None if supported.value else "this driver or GPU cannot register read-only memory"

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        flags = DEVICEMAP | (READ_ONLY if read_only else 0)
        with self._context():
            error = self._driver.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags)
        if error:
            raise RefusedError(f"registering {nbytes / 1e6:.0f} MB failed ({self._name(error)})")

    def unregister(self, address: int) -> None:
        with self._context():
            error = self._driver.cuMemHostUnregister(ctypes.c_void_p(address))
        if error:
            log.warning("unregistering memory failed: %s", self._name(error))  # the GPU is lost: go on with closing

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


def registrar_for(device: torch.device) -> Registrar:
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
