"""Which weights can be sent before anybody has planned where they are to lie: what the link would do nothing for, while
the host makes room and thinks.

A model that comes back to its stage lies as it lay the last time, nearly always. So what stays by the last plan may be
on its way before the host is asked for it, if its pages are still locked (`kept`) and there is room as things are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .kept import KeptPages
from .slots import Located, Slot
from .terms import Terms

HEAD_START_BYTES = 512 << 20  # as long as others still have to leave: what a link copies in the time that takes
LEAST_BYTES = 64 << 20  # what is less can wait


def sendable(slots: Iterable[Slot], located: Located, kept: KeptPages, room: int) -> list[Slot]:
    """Those of `slots`, in order, whose pages are locked, up to `room` bytes; none if that is next to nothing."""
    chosen: list[Slot] = []
    for slot in slots:
        weight = slot.weight(located)
        if weight.file is not None and kept.holds(weight):
            if weight.nbytes > room:
                break
            room -= weight.nbytes
            chosen.append(slot)
    return chosen if sum(slot.nbytes for slot in chosen) >= LEAST_BYTES else []


def unchanged(slots: Iterable[Slot], terms: Terms) -> Iterator[Slot]:
    """Those that nobody patches or casts on their way."""
    for slot in slots:
        if not terms.patched_by_host(slot) and terms.dtype_of(*slot.owners[0]) in (None, slot.home.dtype):
            yield slot
