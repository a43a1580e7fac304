"""Write a GGUF file tensor by tensor, so that it appears whole or not at all.

The header needs every tensor's name, shape and type but no data, so the whole layout is known before the first weight
is made: the file's size is reserved by arithmetic, and the tensors are then written one after the other, in order,
each as soon as it exists. Nothing is kept.

Everything goes into a temporary file beside the target, which takes the target's place in one step at the very end.
Whatever goes wrong before (an error in the caller's code, a cancelled run, a full disk) removes it; a file that was
there before stays as it was.

Layout: the same as in header.py, version 3.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..sizes import aligned, size
from .errors import GGUFError, shown
from .header import DEFAULT_ALIGNMENT, LIMIT_TENSORS
from .types import GGMLType, byte_size
from .values import ARRAY, BOOL, STRING

VERSION = 3
MAX_DIMS = 4  # ggml's; a tensor with more is stored as a matrix
PIECE_BYTES = 16 << 20  # written at a time
PATIENCE = 0.2  # seconds between two looks at whether to go on waiting for the disk
_U32, _INT32, _F32 = 4, 5, 6
_NUMBERS = {_U32: "I", _INT32: "i", _F32: "f", BOOL: "?"}

# What a failed system call means for the one who saves.
_FAILURES = {
    errno.ENOSPC: ("the disk is full", "free some space, or save to another disk"),
    errno.EDQUOT: ("your share of the disk is used up", "free some space, or save to another disk"),
    errno.EFBIG: ("no file of this size is allowed there", "save to another disk"),
    errno.EACCES: ("it may not be written", "choose a folder that you may write to"),
    errno.EPERM: ("it may not be written", "choose a folder that you may write to"),
    errno.EROFS: ("the disk is read-only", "choose a folder that you may write to"),
}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to come: `shape` is row-major, at most four dimensions."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType

    @property
    def nbytes(self) -> int:
        return byte_size(self.shape, self.ggml_type)


class GGUFWriter:
    """Writes one file; use it as a context manager and `write` every tensor, in the order given.

        with GGUFWriter(path, {"general.architecture": "flux"}, tensors) as writer:
            for tensor in tensors:
                writer.write(bytes_of(tensor))

    Args:
        path: what the file will be called; its folder exists.
        metadata: str, bool, int (as u32) and float values, and lists of one of them (ints as int32).
        tensors: what will come.
        meanwhile: called several times a second while the disk is waited for; what it raises ends the work.

    Raises:
        GGUFError: the file cannot be written, or the disk has not the room; also what `write` and leaving the context
            raise. Leaving before every tensor is written is an error of the caller's.
    """

    def __init__(
        self,
        path: str | Path,
        metadata: Mapping[str, Any],
        tensors: Sequence[NewTensor],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.partial = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex[:8]}.partial")
        self._tensors = tuple(tensors)
        self._meanwhile = meanwhile
        self._written = 0
        self._header = _header(self.path, dict(metadata), self._tensors)
        self.nbytes = len(self._header) + sum(_padded(t.nbytes) for t in self._tensors)
        self._file: BinaryIO | None = None

    def __enter__(self) -> GGUFWriter:
        try:
            free = shutil.disk_usage(self.path.parent).free
            if free < self.nbytes:
                problem = f"it will take {size(self.nbytes)}, the disk has {size(free)} left"
                raise GGUFError(self.path, problem, "free some space, save to another disk, or choose a smaller type")
            self._file = self.partial.open("xb")
            self._file.write(self._header)
        except OSError as error:
            self._discard()
            raise self._failure(error) from error
        return self

    def write(self, data: np.ndarray) -> None:
        """The next tensor's bytes: uint8, contiguous, of any shape."""
        tensor = self._tensors[self._written]
        if data.dtype != np.uint8 or data.nbytes != tensor.nbytes:
            raise ValueError(f"tensor {shown(tensor.name)} takes {tensor.nbytes} bytes, {data.nbytes} were given")
        assert self._file is not None, "write outside of the context"
        whole = np.ascontiguousarray(data).reshape(-1).data
        try:
            for at in range(0, len(whole), PIECE_BYTES):
                self._file.write(whole[at : at + PIECE_BYTES])
                self._meanwhile()
            self._file.write(bytes(_padded(tensor.nbytes) - tensor.nbytes))
        except OSError as error:
            raise self._failure(error) from error
        self._written += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as error:
            raise self._failure(error) from error
        finally:
            self._discard()

    def _finish(self) -> None:
        missing = [t.name for t in self._tensors[self._written :]]
        if missing:
            raise ValueError(f"{len(missing)} tensors were not written, beginning with {shown(missing[0])}")
        assert self._file is not None, "left without entering"
        self._file.flush()
        self._sync(self._file.fileno())
        self._file.close()
        os.replace(self.partial, self.path)

    def _sync(self, descriptor: int) -> None:
        """Until the disk has all of it, which may take minutes. The thread has a descriptor of its own: where the
        caller does not want to wait any longer, nobody waits for it."""
        own, failed = os.dup(descriptor), list[OSError]()

        def sync() -> None:
            try:
                os.fsync(own)
            except OSError as error:
                failed.append(error)
            finally:
                os.close(own)

        thread = threading.Thread(target=sync, name="sluice-sync", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                self._meanwhile()
                thread.join(PATIENCE)
        except BaseException:
            if os.name == "nt":  # where an open file cannot be removed
                thread.join()
            raise
        if failed:
            raise failed[0]

    def _discard(self) -> None:
        """Nothing of ours stays, whether or not it became the target."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk once more, when buffered bytes are flushed
                self._file.close()
        self.partial.unlink(missing_ok=True)

    def _failure(self, error: OSError) -> GGUFError:
        if isinstance(error, PermissionError) and self._file is not None and self._file.closed:
            problem = "it cannot be replaced: it is open in this or another program"
            return GGUFError(self.path, problem, "choose another name, or unload the model that is loaded from it")
        if isinstance(error, FileNotFoundError):
            return GGUFError(self.path, f"there is no folder {self.path.parent}", "choose another folder or create it")
        number = error.errno or 0
        problem, remedy = _FAILURES.get(number, (str(error.strerror or error), "try another folder or disk"))
        return GGUFError(self.path, f"writing it failed: {problem}", remedy)


def _header(path: Path, metadata: dict[str, Any], tensors: Sequence[NewTensor]) -> bytes:
    """Everything before the data, padded."""
    names = {t.name for t in tensors}
    if len(names) < len(tensors) or len(tensors) > LIMIT_TENSORS:
        raise ValueError(f"{len(tensors)} tensors of {len(names)} different names; at most {LIMIT_TENSORS} are allowed")
    metadata.setdefault("general.alignment", DEFAULT_ALIGNMENT)
    out = bytearray(b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        kind, payload = _value(value)
        out += _text(key) + struct.pack("<I", kind) + payload
    offset = 0
    for t in tensors:
        if len(t.shape) > MAX_DIMS:
            raise ValueError(f"tensor {shown(t.name)} has {len(t.shape)} dimensions, GGUF has {MAX_DIMS}")
        out += _text(t.name) + struct.pack("<I", len(t.shape))
        out += struct.pack(f"<{len(t.shape)}QIQ", *t.shape[::-1], t.ggml_type, offset)
        offset += _padded(t.nbytes)
    return bytes(out) + bytes(_padded(len(out)) - len(out))


def _value(value: Any) -> tuple[int, bytes]:
    """A metadata value's type number and bytes."""
    if isinstance(value, str):
        return STRING, _text(value)
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], str):
            return ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(map(_text, value))
        kind = _F32 if value and isinstance(value[0], float) else _INT32
        return ARRAY, struct.pack(f"<IQ{len(value)}{_NUMBERS[kind]}", kind, len(value), *value)
    kind = BOOL if isinstance(value, bool) else _F32 if isinstance(value, float) else _U32
    return kind, struct.pack("<" + _NUMBERS[kind], value)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(nbytes: int) -> int:
    return aligned(nbytes, DEFAULT_ALIGNMENT)
