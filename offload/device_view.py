"""A tensor of a device over memory that is already there, without a copy.

torch makes one from a DLPack capsule and takes its word for the address and the device, where the other ways ask CUDA
whose memory it is; nobody but the page tables knows that a GPU may read a plain mapping. The layout is that of
dlpack.h (DLManagedTensor, without a version), which every torch from 1.10 on takes.

The tensor owns nothing. When the last view of it is gone, from whichever thread, the function that was given is called.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
from collections.abc import Callable

import torch

CPU, CUDA, ROCM = 1, 2, 10  # DLDeviceType
UNSIGNED = 1  # DLDataTypeCode


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _ManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("number", ctypes.c_void_p), ("deleter", _Deleter)]


# What torch holds the address of. By number, because a deleter is told nothing but its own address.
_living: dict[int, tuple[_ManagedTensor, ctypes.Array, Callable[[], None]]] = {}
_numbers = itertools.count(1)


@_Deleter
def _gone(address: int) -> None:
    number = _ManagedTensor.from_address(address).number
    *_, released = _living.pop(number)
    released()


@atexit.register
def _forget() -> None:
    """What is freed after the interpreter must not call it any more."""
    for managed, shape, _ in _living.values():
        managed.deleter = _Deleter()
        for kept in (managed, shape):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def bytes_at(address: int, nbytes: int, device: torch.device, released: Callable[[], None]) -> torch.Tensor:
    """`nbytes` bytes from `address` on as a flat uint8 tensor of `device`, which must be able to read them.

    Args:
        released: called once, when nothing is over these bytes any more.
    """
    shape = (ctypes.c_int64 * 1)(nbytes)
    managed = _ManagedTensor()
    managed.tensor.data = address
    managed.tensor.device_type = CPU if device.type == "cpu" else ROCM if torch.version.hip else CUDA
    managed.tensor.device_id = device.index or 0
    managed.tensor.ndim = 1
    managed.tensor.dtype = _DataType(UNSIGNED, 8, 1)
    managed.tensor.shape = shape
    managed.number = number = next(_numbers)
    managed.deleter = _gone
    _living[number] = managed, shape, released
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = new_capsule(ctypes.addressof(managed), b"dltensor", None)
    with torch.inference_mode(False):  # an inference tensor could not become a parameter that others use
        return torch.utils.dlpack.from_dlpack(capsule)
