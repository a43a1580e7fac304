"""Open a GGUF model: its metadata, its tensors, and their bytes without a copy.

A `GGUFFile` maps the file and parses its header; nothing else of it is read until somebody touches a
tensor's bytes. A split model (`splits.py`) opens as one, from any of its parts.

[Note: Lifetimes] A tensor's bytes are handed out only as a memoryview slice of the mapping. Such a
slice counts as an export of the mapping, so Python refuses to unmap under it, and whoever keeps the
slice (torch.frombuffer keeps the object it was given) keeps the pages. The mmap object itself must
never be handed out: torch.frombuffer gives its buffer back at once, and closing the mapping would pull
the pages from under the tensor and kill the process. Nor may anyone call release() on a slice.
`close()` therefore cannot crash: with views alive it reports False and the mapping goes with the last
of them, from whichever thread drops it.

[Note: Shrinking files] A file that is cut short in place while it is mapped kills any process that
touches the lost pages (SIGBUS), and no handler in Python can prevent that. `check_unchanged()` costs two
stat calls per part; call it before using views of a file that has been open for a while. A file that is
replaced by rename is harmless: the old one stays mapped.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DAMAGED, GGUFError, shown
from .header import Deferred
from .part import Part, PartIdentity
from .splits import SAME_DOWNLOAD, check_part, part_paths, whole_number
from .types import GGMLType
from .values import Cursor, read_value

__all__ = ["GGUFError", "GGUFFile", "Metadata", "PartIdentity", "TensorInfo"]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: `shape` is row-major (ggml's dimensions reversed), `offset` counts from the part's start."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    part: int
    offset: int
    nbytes: int


class Metadata(Mapping[str, Any]):
    """The model's metadata. Arrays (as lists) and very long strings are decoded each time they are asked for.

    Keys, membership and length cost nothing; `values()` and `items()` decode everything. What is decoded
    late needs the file open.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self._values = part.header.metadata

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if not isinstance(value, Deferred):
            return value
        with self._part.data() as data:
            return read_value(Cursor(data, self._part.path, value.position, f"metadata key {shown(key)}"), value.kind)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class GGUFFile:
    """A GGUF model, split or not, open for reading: see the module's notes on lifetimes and shrinking files.

    Use it as a context manager, or close() it. `metadata` (but for arrays) and `tensors` stay readable
    when it is closed.

    Raises:
        GGUFError: the file or one of its parts is missing, unreadable, or no sound GGUF file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        self._lock = threading.RLock()
        self._parts: list[Part] = []
        given = Part(self.path)
        try:
            self.parts = part_paths(self.path, given.header.metadata)
            for index, part_path in enumerate(self.parts):
                part = given if part_path == self.path else Part(part_path)
                self._parts.append(part)
                if len(self.parts) > 1:
                    check_part(part_path, part.header.metadata, index, len(self.parts))
            self.tensors = self._collect_tensors()
        except GGUFError:
            for part in {given, *self._parts}:
                part.close()
            raise
        first = self._parts[0]
        self.version = first.header.version
        self.alignment = first.header.alignment
        self.metadata: Mapping[str, Any] = Metadata(first)
        self.closed = False

    def _collect_tensors(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for index, part in enumerate(self._parts):
            for t in part.header.tensors:
                if t.name in tensors:
                    other = self.parts[tensors[t.name].part].name
                    raise GGUFError(part.path, f"tensor {shown(t.name)} is also in {other}", SAME_DOWNLOAD)
                tensors[t.name] = TensorInfo(t.name, t.shape, t.ggml_type, index, t.offset, t.nbytes)
        first = self._parts[0]
        announced = whole_number(first.path, first.header.metadata, "split.tensors.count", default=len(tensors))
        if len(self.parts) > 1 and announced != len(tensors):
            problem = f"'split.tensors.count' announces {announced} tensors, the parts hold {len(tensors)}"
            raise GGUFError(first.path, problem, DAMAGED)
        return tensors

    @property
    def identity(self) -> tuple[PartIdentity, ...]:
        """What identifies each part, as it was when the model was opened."""
        return tuple(part.identity for part in self._parts)

    def view(self, name: str) -> memoryview:
        """The tensor's bytes, read-only and without a copy; they stay valid for as long as the view lives.

        Raises:
            KeyError: there is no such tensor.
            GGUFError: the file is closed.
        """
        tensor = self.tensors[name]
        with self._lock:
            return self._parts[tensor.part].data()[tensor.offset : tensor.offset + tensor.nbytes]

    def file_handle(self, part: int = 0) -> io.FileIO:
        """An unbuffered file open on a part, for hosts that read slices by themselves; closed by close()."""
        return self._parts[part].handle()

    def close(self) -> bool:
        """Release the file. True: it is unmapped now. False: views live, it goes with the last of them.

        Never a crash, and may be repeated: a later call tells whether the last view has gone.
        """
        with self._lock:
            self.closed = True
            released = [part.close() for part in self._parts]
            return all(released)

    def reopen(self) -> None:
        """Open the file again after close(), with the tensors where they were; on an open file, only check it.

        Raises:
            GGUFError: it is not the file that was loaded any more (size, time of modification, header).
        """
        with self._lock:
            if not self.closed:
                return self.check_unchanged()
            try:
                for part in self._parts:
                    part.reopen()
            except GGUFError:
                self.close()
                raise
            self.closed = False

    def check_unchanged(self) -> None:
        """Compare size and time of modification, on disk and of the open file, with those at opening.

        Raises:
            GGUFError: a part was changed, replaced, moved or deleted.
        """
        for part in self._parts:
            part.check_unchanged()

    def same_file(self) -> bool:
        """Whether check_unchanged() would pass."""
        try:
            self.check_unchanged()
        except GGUFError:
            return False
        return True

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<GGUFFile {self.path.name}, {len(self.tensors)} tensors in {len(self.parts)} file(s), {state}>"
