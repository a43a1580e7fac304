"""Write GGUF files in memory, sound or broken in any way, by the specification and without Sluice's reader.

    gguf_bytes({"general.architecture": "flux"}, [Tensor("w", (4, 32), 8)])

Everything that a sound file derives (counts, lengths, offsets) can be overridden, so a hostile file is
a sound one with one thing wrong.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

# Tensor type number -> elements and bytes of a block; the few types that these tests write.
BLOCK_SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 24: (1, 1), 30: (1, 2)}
F32, F16, Q4_0, Q8_0, Q4_K, I8, BF16 = BLOCK_SIZES

U8, INT8, U16, INT16, U32, INT32, FLOAT32, BOOL, STRING, ARRAY, U64, INT64, FLOAT64 = range(13)
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Value:
    """A metadata value as it stands in the file: type number and encoded bytes."""

    kind: int
    payload: bytes


@dataclass
class Tensor:
    """A row of the tensor table with its data; `None` is filled in as a sound file has it."""

    name: str | bytes
    shape: tuple[int, ...]  # row-major
    number: int = F32
    data: bytes | None = None
    offset: int | None = None  # in the data section
    dims: int | None = None
    name_nbytes: int | None = None
    payload: bytes = field(init=False, default=b"")

    def __post_init__(self) -> None:
        elements, nbytes = BLOCK_SIZES.get(self.number, (1, 1))
        size = prod(self.shape) // elements * nbytes
        self.payload = bytes(i % 251 for i in range(size)) if self.data is None else self.data


def text(value: str | bytes, nbytes: int | None = None) -> bytes:
    """An encoded string; `nbytes` lies about its length."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if nbytes is None else nbytes) + raw


def string(value: str | bytes, nbytes: int | None = None) -> Value:
    return Value(STRING, text(value, nbytes))


def number(kind: int, value: float) -> Value:
    return Value(kind, struct.pack("<" + _LETTERS[kind], value))


def array(kind: int, values: list[Any], count: int | None = None) -> Value:
    """An array of numbers, of strings, or of arrays (given as `Value`s); `count` lies about its length."""
    head = struct.pack("<IQ", kind, len(values) if count is None else count)
    if kind == STRING:
        return Value(ARRAY, head + b"".join(map(text, values)))
    if kind == ARRAY:
        return Value(ARRAY, head + b"".join(value.payload for value in values))
    return Value(ARRAY, head + struct.pack(f"<{len(values)}{_LETTERS.get(kind, 'B')}", *values))


def _value(value: Any) -> Value:
    if isinstance(value, Value):
        return value
    if isinstance(value, (str, bytes)):
        return string(value)
    if isinstance(value, bool):
        return number(BOOL, value)
    return number(FLOAT32 if isinstance(value, float) else U32, value)


def gguf_bytes(
    metadata: dict[str, Any] | list[tuple[str | bytes, Any]] = (),  # type: ignore[assignment]
    tensors: list[Tensor] = (),  # type: ignore[assignment]
    *,
    version: int = 3,
    alignment: int = 32,
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """A whole file. `alignment` is the one the data is laid out with; set `general.alignment` to say so."""
    pairs = list(metadata.items()) if isinstance(metadata, dict) else list(metadata)
    out = bytearray(b"GGUF" + struct.pack("<I", version))
    out += struct.pack("<Q", len(tensors) if tensor_count is None else tensor_count)
    out += struct.pack("<Q", len(pairs) if key_count is None else key_count)
    for key, value in pairs:
        encoded = _value(value)
        out += text(key) + struct.pack("<I", encoded.kind) + encoded.payload
    data = bytearray()
    for t in tensors:
        offset = len(data) if t.offset is None else t.offset
        dims = len(t.shape) if t.dims is None else t.dims
        out += text(t.name, t.name_nbytes) + struct.pack("<I", dims)
        out += struct.pack(f"<{len(t.shape)}Q", *t.shape[::-1]) + struct.pack("<IQ", t.number, offset)
        data += t.payload + bytes(-len(t.payload) % alignment)
    return bytes(out) + bytes(-len(out) % alignment) + bytes(data)


def write_split(folder: Path, stem: str, parts: list[bytes]) -> list[Path]:
    """Write parts under the names that gguf-split gives them."""
    paths = [folder / f"{stem}-{i:05d}-of-{len(parts):05d}.gguf" for i in range(1, len(parts) + 1)]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part)
    return paths


def split_keys(no: int, count: int, tensors: int) -> dict[str, Value]:
    """The metadata that makes a file part `no` (from 0) of `count`."""
    return {
        "split.no": number(U16, no),
        "split.count": number(U16, count),
        "split.tensors.count": number(INT32, tensors),
    }
