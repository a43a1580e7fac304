"""Parse a GGUF header in place: metadata and tensor table, without the arrays' contents.

Layout, little-endian (GGUF specification, ggml/docs/gguf.md), the same in versions 2 and 3:

    "GGUF"  u32 version  u64 tensors  u64 keys
    keys    x { string key, u32 type, value }
    tensors x { string name, u32 dims, u64 dim[dims] (fastest first), u32 type, u64 offset }
    padding to `general.alignment` (32 if absent), then the data, from which offsets count

What contradicts itself is refused here, so that nothing behind this module has to doubt a tensor's
extent: every tensor lies inside the file, on its alignment, and over no other tensor.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DAMAGED, INCOMPLETE, NEWER, GGUFError, not_gguf, shown
from .types import GGMLType, byte_size
from .values import ARRAY, MIN_BYTES, Cursor, read_value, skip_value

LIMIT_KEYS = 1 << 16
LIMIT_TENSORS = 1 << 16
LIMIT_DIMS = 8  # ggml has 4; converted convolutions were seen with 5
LIMIT_ALIGNMENT = 1 << 20
LAZY_STRING_BYTES = 1 << 16  # longer strings (whole tokenizers as JSON) are left in the file like arrays
DEFAULT_ALIGNMENT = 32

# Tensor type numbers that ggml gave up. Numbers: ggml.h, the comments in `enum ggml_type`.
_RETIRED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"} | {
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


@dataclass(frozen=True)
class Deferred:
    """A value left in the file: its type and where it begins."""

    kind: int
    position: int


@dataclass(frozen=True)
class TensorEntry:
    """One checked row of the tensor table; `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What one file says about itself; `nbytes` is its length before padding and data."""

    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    nbytes: int


def parse_header(data: memoryview, path: Path) -> Header:
    """Read and check everything before the tensor data.

    Raises:
        GGUFError: not a GGUF file, not one that can be read, or one that contradicts itself.
    """
    if data[:4] != b"GGUF":
        raise not_gguf(path, bytes(data[:64]))
    cursor = Cursor(data, path, position=4)
    version = _version(cursor)
    tensor_count, key_count = cursor.u64(), cursor.u64()
    metadata = _metadata(cursor, key_count)
    alignment = _alignment(cursor, metadata)
    rows = _tensor_table(cursor, tensor_count)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = tuple(_check_tensor(cursor, row, data_start, alignment) for row in rows)
    _check_overlaps(path, tensors)
    return Header(version, alignment, metadata, tensors, cursor.position)


def _version(cursor: Cursor) -> int:
    version = cursor.u32()
    if version in (2, 3):
        return version
    if version == 0:
        raise cursor.error("names GGUF version 0, which does not exist")
    if version == 1:
        raise cursor.error("is of GGUF version 1 (2023), Sluice reads 2 and 3", "download or convert a newer version")
    if version & 0xFFFF == 0:
        raise cursor.error(
            "is big-endian, Sluice reads little-endian files", "get or convert the little-endian version"
        )
    raise cursor.error(f"is of GGUF version {version}, Sluice reads 2 and 3", NEWER)


def _metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    if count > LIMIT_KEYS or count * (8 + 4 + 1) > cursor.left:
        raise cursor.error(
            f"announces {count} metadata keys, too many for any model or for the {cursor.left} bytes left"
        )
    metadata: dict[str, Any] = {}
    for index in range(count):
        cursor.place = f"metadata key {index + 1} of {count}"
        key = cursor.name()
        cursor.place = f"metadata key {shown(key)}"
        if key in metadata:
            raise cursor.error("appears twice")
        kind = cursor.u32()
        if kind not in MIN_BYTES:
            raise cursor.error(f"has the unknown value type {kind}", NEWER)
        start = cursor.position
        skip_value(cursor, kind)
        if kind == ARRAY or cursor.position - start > LAZY_STRING_BYTES:
            metadata[key] = Deferred(kind, start)
        else:
            cursor.position = start
            metadata[key] = read_value(cursor, kind)
    return metadata


def _alignment(cursor: Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    cursor.place = "metadata key 'general.alignment'"
    whole = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not whole or not 8 <= alignment <= LIMIT_ALIGNMENT or alignment & (alignment - 1):
        value = alignment if isinstance(alignment, (int, float)) else "no number"
        raise cursor.error(f"is {value}, it must be a power of two from 8 to {LIMIT_ALIGNMENT}")
    return alignment


def _tensor_table(cursor: Cursor, count: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Rows as written: name, shape (reversed to row-major), type number, offset into the data."""
    cursor.place = "the tensor table"
    if count > LIMIT_TENSORS or count * (8 + 4 + 4 + 8) > cursor.left:
        raise cursor.error(f"announces {count} tensors, too many for any model or for the {cursor.left} bytes left")
    rows = []
    seen: set[str] = set()
    for index in range(count):
        cursor.place = f"tensor {index + 1} of {count}"
        name = cursor.name()
        cursor.place = f"tensor {shown(name)}"
        if name in seen:
            raise cursor.error("appears twice")
        seen.add(name)
        dims = cursor.u32()
        if dims > LIMIT_DIMS:
            raise cursor.error(f"has {dims} dimensions, at most {LIMIT_DIMS} are allowed")
        start = cursor.take(8 * dims + 4 + 8)
        *shape, number, offset = struct.unpack_from(f"<{dims}QIQ", cursor.data, start)
        rows.append((name, tuple(shape[::-1]), number, offset))
    return rows


def _check_tensor(
    cursor: Cursor, row: tuple[str, tuple[int, ...], int, int], data_start: int, alignment: int
) -> TensorEntry:
    name, shape, number, offset = row
    cursor.place = f"tensor {shown(name)}"
    if number in _RETIRED:
        raise cursor.error(
            f"has the type {_RETIRED[number]} ({number}), which ggml retired", "get or convert a newer file"
        )
    try:
        ggml_type = GGMLType(number)
    except ValueError:
        raise cursor.error(f"has the unknown tensor type {number}", NEWER) from None
    try:
        nbytes = byte_size(shape, ggml_type)
    except ValueError as error:
        raise GGUFError(cursor.path, f"{cursor.place}: {error}", DAMAGED) from None
    if offset % alignment:
        raise cursor.error(f"begins at byte {offset} of the data, which is not on the file's alignment of {alignment}")
    begin, size = data_start + offset, len(cursor.data)
    if nbytes and begin + nbytes > size:
        # More bytes than 2^48 exist on no disk: that is no cut-off download.
        remedy = INCOMPLETE if begin + nbytes < 1 << 48 else DAMAGED
        raise cursor.error(f"ends at byte {begin + nbytes}, the file has {size}", remedy)
    if begin > size + alignment:
        raise cursor.error(f"is empty and lies at byte {begin}, the file has {size}")
    return TensorEntry(name, shape, ggml_type, begin, nbytes)


def _check_overlaps(path: Path, tensors: tuple[TensorEntry, ...]) -> None:
    end, last = 0, ""
    for tensor in sorted((t for t in tensors if t.nbytes), key=lambda t: t.offset):
        if tensor.offset < end:
            problem = f"tensor {shown(tensor.name)} begins at byte {tensor.offset}, inside tensor {shown(last)}"
            raise GGUFError(path, problem, DAMAGED)
        end, last = tensor.offset + tensor.nbytes, tensor.name
