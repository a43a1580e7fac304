"""What moved into and out of VRAM, and why: the last few hundred events, for the log and the report.

Nothing here decides anything. The list is the process's own, because stages of several models and workflows share one
GPU, and it is bounded by its length.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass

from ..loaders.sizes import size

log = logging.getLogger("sluice.offload")

KEPT = 256  # events; a picture has about ten


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    time: float  # seconds since 1970
    action: str  # "begins", "leaves", "comes back", "stays out", "is released", "released"
    what: str
    nbytes: int  # that the stage needs, or that moved
    why: str

    def __str__(self) -> str:
        return f"{self.what} {self.action} ({size(self.nbytes)}): {self.why}"


_events: deque[Event] = deque(maxlen=KEPT)


def record(action: str, what: str, nbytes: int, why: str, logged: bool = False) -> Event:
    """Remember an event; `logged`: at level info, else at debug."""
    event = Event(time.time(), action, what, int(nbytes), why)
    _events.append(event)
    log.log(logging.INFO if logged else logging.DEBUG, "%s", event)
    return event


def recent_events() -> tuple[Event, ...]:
    """The last events, oldest first."""
    return tuple(_events)
