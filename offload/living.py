"""Objects of one kind as long as they live, for any thread to list: a weak set may not grow while it is listed."""

from __future__ import annotations

import threading
import weakref
from typing import Generic, TypeVar

One = TypeVar("One")


class Living(Generic[One]):
    """Weakly holds what is added."""

    def __init__(self) -> None:
        self._members: weakref.WeakSet[One] = weakref.WeakSet()
        self._guard = threading.Lock()

    def add(self, one: One) -> None:
        with self._guard:
            self._members.add(one)

    def all(self) -> list[One]:
        with self._guard:
            return list(self._members)
