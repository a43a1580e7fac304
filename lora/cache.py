"""Adapters that were read, kept while they are likely to be wanted again, up to so many bytes.

A workflow that changes a strength, or goes back to the LoRA before last, need not read the file again. Adapters are
known by path, size, time of change and inode, so a file that was replaced is read anew. The least recently used go
first. The tensors are shared with the models that use them; what a cache lets go lives as long as such a model.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..loaders.read_ahead import Watch
    from .read import AdapterFile

Identity = tuple[str, int, int, int]


@dataclass(frozen=True)
class CacheState:
    """What a report says of a cache."""

    nbytes: int
    bound_bytes: int
    files: int
    hits: int
    misses: int


class AdapterCache:
    """Reads adapters and keeps the last ones.

    Args:
        bound_bytes: what the kept ones take together at most; one that is larger is not kept.
    """

    def __init__(self, bound_bytes: int) -> None:
        self.bound_bytes = bound_bytes
        self._files: OrderedDict[Identity, AdapterFile] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get(
        self,
        path: str | os.PathLike[str],
        rank_known: Callable[[int], None] | None = None,
        watch: Watch | None = None,
    ) -> AdapterFile:
        """The adapter at `path`, read if it is not here; then `rank_known` and `watch` are told as `read` tells them.

        Raises:
            LoraError: as `read` does.
        """
        from ..loaders.read_ahead import unwatched
        from .read import read  # late: the node that owns a cache is imported when ComfyUI starts

        identity = _identity(path)
        with self._lock:
            if identity in self._files:
                self._hits += 1
                self._files.move_to_end(identity)
                return self._files[identity]
            self._misses += 1
        # Outside the lock: the server, which asks for the state, must not wait for a disk.
        file = read(path, rank_known, watch or unwatched)
        with self._lock:
            for known in [known for known in self._files if known[0] == identity[0]]:
                del self._files[known]  # the file before it was replaced
            if file.nbytes <= self.bound_bytes:
                self._files[identity] = file
                while self._nbytes() > self.bound_bytes:
                    self._files.popitem(last=False)
            return file

    def clear(self) -> None:
        with self._lock:
            self._files.clear()

    def state(self) -> CacheState:
        with self._lock:
            return CacheState(self._nbytes(), self.bound_bytes, len(self._files), self._hits, self._misses)

    def _nbytes(self) -> int:
        return sum(file.nbytes for file in self._files.values())


def _identity(path: str | os.PathLike[str]) -> Identity:
    resolved = Path(path).resolve()
    try:
        status = resolved.stat()
    except OSError:
        return (str(resolved), 0, 0, 0)  # `read` says what is wrong
    return (str(resolved), status.st_size, status.st_mtime_ns, status.st_ino)
