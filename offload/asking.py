"""What the host is told that a model will take, while it makes room for it: not always all that the model is.

The host makes room for the whole of a model that is asked for, and moves others to RAM for it even where the model
streams in any case, or where a part of it was sent ahead. In `asking` the model's size is what it is still to be given;
everywhere else, and to other threads, it is the size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_asked: ContextVar[tuple[torch.nn.Module, int] | None] = ContextVar("sluice_asked", default=None)


@contextmanager
def asking(network: torch.nn.Module, nbytes: int | None) -> Iterator[None]:
    """Around the host's making room for `network`: it asks for no more than so many bytes; None: for all of it."""
    token = _asked.set(None if nbytes is None else (network, nbytes))
    try:
        yield
    finally:
        _asked.reset(token)


def asked_for(network: torch.nn.Module, size: int) -> int:
    """What the host is told of a network of `size` bytes."""
    asked = _asked.get()
    return size if asked is None or asked[0] is not network else min(size, asked[1])
