"""The header of a safetensors file: names, types and places of its tensors, checked.

Eight bytes with the length of a JSON header, the header, then the tensors' bytes back to back. The header maps each
name to `dtype`, `shape` and `data_offsets` (counted from the end of the header); `__metadata__` maps strings to
strings. Layout: README.md of huggingface/safetensors. The library itself maps whole files, and what is read through a
mapping stays in memory twice while it is converted.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, BinaryIO, TypeGuard

import torch

MAX_HEADER_BYTES = 100 << 20  # the library's own limit
LARGEST = 1 << 62  # elements; torch multiplies sizes, whether one of them is 0 or not

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MalformedError(ValueError):
    """What is wrong with the file, and where, as the middle of a sentence."""


class UnknownTypeError(MalformedError):
    """A tensor is of a type that is not in `DTYPES`."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `offset` counts from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def parse(file: BinaryIO, size: int) -> tuple[list[Entry], dict[str, str]]:
    """The tensors in the order of their bytes, and the metadata, of a file of `size` bytes.

    Raises:
        MalformedError: the header is none, or names bytes that the file does not have.
    """
    header, start = _header(file, size)
    metadata = header.pop("__metadata__", None)
    entries = [_entry(name, value, start, size) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    for one, other in pairwise(entry for entry in entries if entry.nbytes):
        if one.offset + one.nbytes > other.offset:  # a small file could ask for any amount of memory
            raise MalformedError(f"tensors {one.name[:80]!r} and {other.name[:80]!r} are said to lie at the same place")
    strings = metadata.items() if isinstance(metadata, dict) else ()
    return entries, {str(k): v for k, v in strings if isinstance(v, str)}


def names(file: BinaryIO, size: int) -> set[str]:
    """Of the tensors, whatever their types.

    Raises:
        MalformedError: the header is none.
    """
    return _header(file, size)[0].keys() - {"__metadata__"}


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """And where the tensors' bytes begin."""
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise MalformedError(f"its header says that it is {length} bytes long, the file has {size}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"its header is no JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise MalformedError("its header is no JSON object")
    return header, 8 + length


def _entry(name: str, value: Any, start: int, size: int) -> Entry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = DTYPES.get(str(fields.get("dtype"))), fields.get("shape"), fields.get("data_offsets")
    if dtype is None:
        raise UnknownTypeError(f"tensor {name[:80]!r} is of type {str(fields.get('dtype'))[:20]!r}, which is not known")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise MalformedError(f"tensor {name[:80]!r} has no proper shape or place")
    if prod(max(n, 1) for n in shape) >= LARGEST:
        raise MalformedError(f"tensor {name[:80]!r} has a shape that no tensor has")
    begin, end = offsets
    nbytes = prod(shape) * dtype.itemsize
    if end - begin != nbytes or start + end > size:
        raise MalformedError(
            f"tensor {name[:80]!r} of {nbytes} bytes is said to lie at {start + begin} to {start + end} of {size}"
        )
    return Entry(name, dtype, tuple(shape), start + begin, nbytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def read_into(file: BinaryIO, entry: Entry, out: torch.Tensor, first: int = 0) -> None:
    """Fill `out`, contiguous, from the (unbuffered) file with the entry's elements from `first` on.

    Raises:
        MalformedError: the file ends before the tensor does.
    """
    if out.nbytes == 0:
        return
    target = out.view(-1).view(torch.uint8).numpy().data
    file.seek(entry.offset + first * entry.dtype.itemsize)
    done = 0
    while done < out.nbytes:
        got = file.readinto(target[done:])  # type: ignore[attr-defined]
        if not got:
            raise MalformedError(f"the file ends within tensor {entry.name[:80]!r}")
        done += got
