"""Take values out of a GGUF header's bytes: the cursor, strings, scalars and arrays.

A string is a u64 length and its bytes. An array is a u32 element type, a u64 count, the elements.

A vocabulary is several hundred thousand strings and the whole cost of a header: they are stepped over
by their lengths, in the tightest loop that Python has, and decoded only when someone asks for the key.
Numeric arrays are stepped over by arithmetic.

[Note: Hostile counts] Every count is compared with the bytes that are left before anything loops or
allocates, so that the work is bounded by the file's size; the LIMIT_* values bound it for huge files
too. They are generous multiples of what any published model has.
"""

from __future__ import annotations

import struct
from itertools import repeat
from pathlib import Path
from typing import Any

from .errors import DAMAGED, INCOMPLETE, NEWER, GGUFError

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

# Value type number -> struct letter. A bool is read as a byte, to see that it is 0 or 1.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9
# Value type number -> the fewest bytes that such a value takes.
MIN_BYTES = {kind: struct.calcsize("<" + letter) for kind, letter in _SCALARS.items()} | {STRING: 8, ARRAY: 12}

LIMIT_NAME_BYTES = 65535  # the specification's, for keys
LIMIT_STRINGS = 1 << 22  # in all arrays together; a large vocabulary with its merges has under 2^20
LIMIT_NESTING = 4
# Element type -> what stepping over one costs, in strings. Numbers cost nothing.
_EFFORT = {STRING: 1, ARRAY: 16}


class Cursor:
    """A position in the file's bytes. Whatever is taken was there: running off the end is an error."""

    def __init__(self, data: memoryview, path: Path, position: int = 0, place: str = "the header") -> None:
        self.data = data
        self.path = path
        self.position = position
        self.place = place
        self.effort_left = LIMIT_STRINGS

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def error(self, problem: str, remedy: str = DAMAGED) -> GGUFError:
        """An error about the present place; `problem` continues the sentence that the place begins."""
        return GGUFError(self.path, f"{self.place} {problem}", remedy)

    def take(self, nbytes: int) -> int:
        """Step over `nbytes`; returns where they begin."""
        start = self.position
        if nbytes > self.left:
            problem = f"needs {nbytes} bytes at byte {start}, the file ends at byte {len(self.data)}"
            raise self.error(problem, INCOMPLETE)
        self.position = start + nbytes
        return start

    def u32(self) -> int:
        return _U32.unpack_from(self.data, self.take(4))[0]

    def u64(self) -> int:
        return _U64.unpack_from(self.data, self.take(8))[0]

    def string(self, limit: int | None = None) -> str:
        length = self.u64()
        if limit is not None and length > limit:
            raise self.error(f"has a name of {length} bytes at byte {self.position}, at most {limit} are allowed")
        start = self.take(length)
        try:
            return str(self.data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"holds a string at byte {start} that is not UTF-8 ({error.reason})") from None

    def name(self) -> str:
        name = self.string(LIMIT_NAME_BYTES)
        if not name:
            raise self.error("has an empty name")
        return name

    def skip_strings(self, count: int) -> None:
        data, position, length_at = self.data, self.position, _U64.unpack_from
        try:
            for _ in repeat(None, count):
                position += 8 + length_at(data, position)[0]
        except (struct.error, OverflowError):
            position = len(data) + 1
        if position > len(data):
            problem = f"is an array of {count} strings that runs past the file's end at byte {len(data)}"
            raise self.error(problem, INCOMPLETE)
        self.position = position

    def strings(self, count: int) -> list[str]:
        """Decode what skip_strings() steps over; that it does so first makes the loop safe."""
        start = self.position
        self.skip_strings(count)
        data, end, length_at = self.data, start, _U64.unpack_from
        values = []
        try:
            for _ in repeat(None, count):
                begin = end + 8
                end = begin + length_at(data, end)[0]
                values.append(str(data[begin:end], "utf-8"))
        except UnicodeDecodeError as error:
            raise self.error(f"holds a string at byte {begin} that is not UTF-8 ({error.reason})") from None
        return values

    def array_head(self, depth: int) -> tuple[int, int]:
        """Element type and count of the array at the cursor, both plausible."""
        kind, count = self.u32(), self.u64()
        if kind not in MIN_BYTES:
            raise self.error(f"is an array of the unknown value type {kind}", NEWER)
        if depth >= LIMIT_NESTING:
            raise self.error(f"nests arrays more than {LIMIT_NESTING} deep")
        if count * MIN_BYTES[kind] > self.left:
            problem = f"is an array of {count} elements, the file has {self.left} bytes left for them"
            raise self.error(problem, INCOMPLETE)
        self.effort_left -= count * _EFFORT.get(kind, 0)
        if self.effort_left < 0:
            raise self.error(f"is an array of {count} strings or arrays, more than any model has")
        return kind, count


def skip_value(cursor: Cursor, kind: int, depth: int = 0) -> None:
    """Step over a value without decoding it."""
    if kind == STRING:
        cursor.take(cursor.u64())
    elif kind == ARRAY:
        element, count = cursor.array_head(depth)
        if element == STRING:
            cursor.skip_strings(count)
        elif element == ARRAY:
            for _ in repeat(None, count):
                skip_value(cursor, ARRAY, depth + 1)
        else:
            cursor.take(count * MIN_BYTES[element])
    else:
        cursor.take(MIN_BYTES[kind])


def read_value(cursor: Cursor, kind: int, depth: int = 0) -> Any:
    """Decode a value; an array becomes a list."""
    if kind == STRING:
        return cursor.string()
    if kind == ARRAY:
        element, count = cursor.array_head(depth)
        if element in _SCALARS:
            return _numbers(cursor, element, count)
        if element == STRING:
            return cursor.strings(count)
        return [read_value(cursor, ARRAY, depth + 1) for _ in repeat(None, count)]
    return _numbers(cursor, kind, 1)[0]


def _numbers(cursor: Cursor, kind: int, count: int) -> list[Any]:
    start = cursor.take(count * MIN_BYTES[kind])
    numbers = struct.unpack_from(f"<{count}{_SCALARS[kind]}", cursor.data, start)
    if kind != BOOL:
        return list(numbers)
    if count and max(numbers) > 1:
        raise cursor.error(f"holds the bool {max(numbers)}, which is neither 0 nor 1")
    return [number == 1 for number in numbers]
