"""Which bytes of which file a tensor is a view of, as the host knows it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from ..loaders import compat
from .files import StoredFile


def located(tensor: torch.Tensor) -> tuple[StoredFile, int] | None:
    """The file and offset of a tensor's bytes, if the host knows that they lie in one."""
    found = compat.file_slice(tensor)
    if found is None:
        return None
    path, size, mtime_ns, offset = found
    return _stored(path, size, mtime_ns), offset


@lru_cache(maxsize=64)  # a model asks for each of its weights, all of them in a file or two
def _stored(path: str, size: int, mtime_ns: int) -> StoredFile:
    return StoredFile(Path(path), size, mtime_ns)
