"""Where a weight's bytes are, and reading them from a file that others may change meanwhile.

A file is never read through a mapping: where a mapped file has been cut off, touching it kills the process. `preadv`
reports it instead. The file must be the one that was loaded, which its size and time of modification tell; one that was
moved, deleted or replaced at its path while it is open here still gives its own bytes.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import SourceError

Key = tuple[int, int]  # a block, and a tensor of it: as in the plan's copies

DOWNLOAD = "put the file back as it was or download it again, then load the model again"
DIRECT_ALIGN = 4096  # what O_DIRECT asks of offsets, sizes and addresses on every common disk


@dataclass(frozen=True)
class StoredFile:
    """A file as it was when the model was loaded."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> StoredFile:
        status = os.stat(path)
        return cls(Path(path), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Weight:
    """The bytes of one tensor: in a file, from `offset` on, or else in host memory."""

    nbytes: int
    file: StoredFile | None = None
    offset: int = 0
    data: torch.Tensor | None = None  # uint8, one-dimensional

    def __post_init__(self) -> None:
        if (self.file is None) == (self.data is None):
            raise ValueError("a weight is either in a file or in memory")
        if self.data is not None and not (
            self.data.dtype is torch.uint8 and self.data.shape == (self.nbytes,) and self.data.is_contiguous()
        ):
            raise ValueError(
                f"a weight in memory is given as its bytes: expected uint8 of shape ({self.nbytes},), "
                f"got {self.data.dtype} of shape {tuple(self.data.shape)}"
            )
        if self.file is not None and not 0 <= self.offset <= self.file.size - self.nbytes:
            raise SourceError(
                self.file.path,
                f"a weight ends at byte {self.offset + self.nbytes}, the file has {self.file.size}",
                DOWNLOAD,
            )


class WeightFile:
    """A file open for reading by several threads, until `close`."""

    def __init__(self, stored: StoredFile) -> None:
        self.stored = stored
        self._direct: int | None = None
        self._seeking = threading.Lock()
        try:
            self._raw = io.FileIO(stored.path)
        except OSError as error:
            raise SourceError(stored.path, f"it cannot be opened ({error.strerror})", DOWNLOAD) from error
        try:
            self.check()
        except SourceError:
            self._raw.close()
            raise

    def fileno(self) -> int:
        return self._raw.fileno()

    def read_directly(self) -> bool:
        """From now on past the page cache, where system and file system can; whether they can."""
        if self._direct is None and hasattr(os, "O_DIRECT"):
            try:
                # Through the descriptor: at the path there may be another file by now.
                self._direct = os.open(f"/proc/self/fd/{self.fileno()}", os.O_RDONLY | os.O_DIRECT)
            except OSError:
                return False
        return self._direct is not None

    def read_into(self, view: memoryview, offset: int, needed: int | None = None) -> None:
        """Fill `view` from `offset` on; at the end of the file the first `needed` bytes of it are enough.

        Reads directly where asked to: `view` and `offset` must then lie on DIRECT_ALIGN.
        """
        needed = len(view) if needed is None else needed
        done = 0
        while done < needed:
            try:
                count = self._read_at(view[done:], offset + done)
            except OSError as error:
                raise SourceError(
                    self.stored.path, f"reading at byte {offset + done} failed ({error.strerror})", "check the disk"
                ) from error
            if not count:
                end = os.fstat(self.fileno()).st_size
                raise SourceError(
                    self.stored.path,
                    f"a weight reaches to byte {offset + needed}, the file ends at {end}: it was cut off while in use",
                    DOWNLOAD,
                )
            done += count

    def _read_at(self, view: memoryview, offset: int) -> int:
        if self._direct is not None and offset % DIRECT_ALIGN == 0 and len(view) % DIRECT_ALIGN == 0:
            return os.preadv(self._direct, [view], offset)
        if hasattr(os, "preadv"):
            return os.preadv(self.fileno(), [view], offset)
        with self._seeking:
            self._raw.seek(offset)
            return self._raw.readinto(view) or 0

    def check(self) -> None:
        """SourceError if the open file is no longer what was loaded."""
        status = os.fstat(self.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.stored.size, self.stored.mtime_ns):
            was, now = (f"{size} bytes" for size in (self.stored.size, status.st_size))
            how = "written to" if was == now else f"{was} then, {now} now"
            raise SourceError(self.stored.path, f"the file was changed since it was loaded ({how})", DOWNLOAD)

    def close(self) -> None:
        self._raw.close()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


class OpenFiles:
    """Every file that some weights lie in, opened once."""

    def __init__(self, weights: Iterable[Weight]) -> None:
        self._files: dict[StoredFile, WeightFile] = {}
        try:
            for weight in weights:
                if weight.file is not None and weight.file not in self._files:
                    self._files[weight.file] = WeightFile(weight.file)
        except SourceError:
            self.close()
            raise

    def of(self, weight: Weight) -> WeightFile:
        assert weight.file is not None
        return self._files[weight.file]

    def all(self) -> Iterable[WeightFile]:
        return self._files.values()

    def check(self) -> None:
        for file in self._files.values():
            file.check()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def streamed_bytes(weights: Mapping[Key, Weight]) -> int:
    return sum(weight.nbytes for weight in weights.values())
