"""One file of a model on the disk: its handle, its mapping, its header, and whether it is still the same file.

The notes on lifetimes and on shrinking files in `reader.py` say why the mapping is treated as it is.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path

from .errors import INCOMPLETE, GGUFError
from .header import Header, parse_header

# Of a longer header only this much from both ends is hashed, so that a hostile one costs no minutes.
_HASHED_BYTES = 32 << 20

_OPEN_ERRORS: dict[type[Exception], tuple[str, str]] = {
    FileNotFoundError: ("there is no such file", "check its name and folder"),
    NotADirectoryError: ("there is no such file", "check its name and folder"),
    PermissionError: ("it may not be read", "give the user that runs ComfyUI permission to read it"),
}


@dataclass(frozen=True)
class PartIdentity:
    """What a file must match to count as the same one."""

    size: int
    mtime_ns: int
    header_nbytes: int
    header_hash: str


class _RawFile(io.FileIO):
    """An unbuffered file that closes itself without a ResourceWarning when the last reference goes."""

    def __del__(self) -> None:
        self.close()


class Part:
    """An open GGUF file. `GGUFFile` serialises open, close and views.

    Raises:
        GGUFError: it cannot be opened, or is no sound GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: _RawFile | None = None
        self._map: mmap.mmap | None = None
        self._outlived: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # closed mappings that views keep
        self._open()
        try:
            with self.data() as data:
                self.header: Header = parse_header(data, path)
                self.identity = self._identify(data, self.header.nbytes)
        except GGUFError:
            # The error's traceback would keep the mapping, and on Windows lock the file, for as long as it lives.
            self.close()
            raise

    def _open(self) -> None:
        try:
            status = os.stat(self.path)
            # Opening a named pipe would wait for its writer for ever.
            if not stat.S_ISREG(status.st_mode):
                what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise GGUFError(self.path, f"it is {what}", "choose a .gguf file")
            if status.st_size == 0:
                raise GGUFError(self.path, "the file is empty (0 bytes)", INCOMPLETE)
            handle = _RawFile(self.path)
            try:
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            except BaseException:
                handle.close()
                raise
            self._handle = handle
        except GGUFError:
            raise
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            unknown = (f"it cannot be opened ({reason})", "check its path and disk")
            raise GGUFError(self.path, *_OPEN_ERRORS.get(type(error), unknown)) from error

    def data(self) -> memoryview:
        """The whole file. Release it, or hand out slices of it."""
        try:
            return memoryview(self._map)  # type: ignore[arg-type]  # None once closed: TypeError
        except (TypeError, ValueError):  # ValueError: closed by another thread this moment
            raise self._closed() from None

    def handle(self) -> io.FileIO:
        if self._handle is None:
            raise self._closed()
        return self._handle

    def _closed(self) -> GGUFError:
        return GGUFError(self.path, "the file was closed", "reopen() it first")

    def _identify(self, data: memoryview, header_nbytes: int) -> PartIdentity:
        head = min(header_nbytes, _HASHED_BYTES)
        tail = max(header_nbytes - _HASHED_BYTES, head)
        header = hashlib.sha256(data[:head])
        header.update(data[tail:header_nbytes])
        status = os.fstat(self.handle().fileno())
        return PartIdentity(len(data), status.st_mtime_ns, header_nbytes, header.hexdigest())

    def close(self) -> bool:
        """Whether nothing of the file is mapped any more."""
        handle, self._handle = self._handle, None
        mapping, self._map = self._map, None
        if handle is not None:
            handle.close()
        if mapping is not None:
            try:
                mapping.close()
            except BufferError:
                self._outlived.add(mapping)
        del mapping
        return not self._outlived

    def reopen(self) -> None:
        self._open()
        with self.data() as data:
            now = self._identify(data, self.identity.header_nbytes)
        if now != self.identity:
            self.close()
            raise self._changed(now.size, now.mtime_ns)

    def check_unchanged(self) -> None:
        """Compare size and time of modification at the path, and of the open file, with those at opening."""
        try:
            found = [os.stat(self.path)]
        except OSError as error:
            problem = f"the file was moved or deleted since it was loaded ({error.strerror})"
            raise GGUFError(self.path, problem, "put it back, or load the model again") from error
        handle = self._handle
        if handle is not None and not handle.closed:
            found.append(os.fstat(handle.fileno()))
        for status in found:
            if (status.st_size, status.st_mtime_ns) != (self.identity.size, self.identity.mtime_ns):
                raise self._changed(status.st_size, status.st_mtime_ns)

    def _changed(self, size: int, mtime_ns: int) -> GGUFError:
        if size != self.identity.size:
            what = f"it had {self.identity.size} bytes and has {size}"
        elif mtime_ns != self.identity.mtime_ns:
            what = "its time of modification differs"
        else:
            what = "its header differs"
        problem = f"the file was changed or replaced since it was loaded ({what})"
        return GGUFError(self.path, problem, "load the model again")
