"""Choose where streamed weights come from: the first rung of a ladder that works here, with the reason.

    page_cache   the file's cached pages, registered in place           no RAM of its own, full speed
    pinned       a copy in locked memory                                RAM for all that streams, full speed
    disk         read again every step through a pinned ring            256 MiB of RAM, the disk's speed
    memory       weights that are in RAM to begin with, where they are  full speed if they are pinned

That a rung is refused is normal and changes nothing but the speed. A file that cannot be read or is not the one that
was loaded is an error on every rung.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import psutil

from ..loaders.read_ahead import Watch, unwatched
from .device import Device
from .disk import disk
from .errors import NoRoomToLockError, RefusedError, StreamError
from .files import Key, Weight
from .host_memory import Request, Source, memory, pinned
from .kept import KeptPages, give_all_back
from .page_cache import page_cache

log = logging.getLogger("sluice.offload")

AUTO = "auto"
LADDER: dict[str, Callable[[Request], Source]] = {
    "page_cache": page_cache,
    "pinned": pinned,
    "disk": disk,
    "memory": memory,
}


@dataclass(frozen=True)
class Choice:
    """A source, and why the rungs above it were not taken."""

    source: Source
    refusals: tuple[tuple[str, str], ...]

    @property
    def reason(self) -> str:
        refused = "".join(f"; not {rung}: {why}" for rung, why in self.refusals)
        return f"{self.source.kind}: {self.source.reason}{refused}"


def choose(
    weights: Mapping[Key, Weight],
    device: Device,
    *,
    ram_budget_bytes: int,
    kind: str = AUTO,
    free_ram_bytes: int | None = None,
    may_pin: bool = True,
    threads: int = 8,
    watch: Watch = unwatched,
    kept: KeptPages | None = None,
) -> Choice:
    """The best source for `weights`, which must be in the order of the plan's copies.

    Args:
        ram_budget_bytes: how much memory of its own the source may lock.
        kind: where on the ladder to begin. What is refused there falls to the rungs below.
        free_ram_bytes: what the system has left, its file cache included; measured if not given.
        may_pin: False where the user switched pinned memory off.
        watch: told of reading and locking; what it raises leaves nothing read, locked or open.
        kept: pages of the files that are locked already, and stay so after the source. Where what other models keep so
            takes the room of this source, they give it back.

    Raises:
        SourceError: a file is not what was loaded, or cannot be read.
    """
    if kind != AUTO and kind not in LADDER:
        raise ValueError(f"there is no weight source {kind!r}; choose {AUTO}, {', '.join(LADDER)}")
    free = psutil.virtual_memory().available if free_ram_bytes is None else free_ram_bytes
    request = Request(weights, device, ram_budget_bytes, free, may_pin, threads, watch, kept)
    rungs = list(LADDER)
    refusals: list[tuple[str, str]] = []
    for rung in rungs[0 if kind == AUTO else rungs.index(kind) :]:
        try:
            choice = Choice(_with_room(LADDER[rung], request), tuple(refusals))
        except RefusedError as refusal:
            refusals.append((rung, str(refusal)))
            continue
        log.info("streamed weights come from %s", choice.reason)
        return choice
    tried = "; ".join(f"{rung}: {why}" for rung, why in refusals)
    raise StreamError(
        f"no source for the streamed weights ({tried}); free RAM, or check that the model's file is still there, then "
        "run again"
    )


def _with_room(rung: Callable[[Request], Source], request: Request) -> Source:
    """The rung's source; once more where it was refused for pages that are locked for models out of use."""
    try:
        return rung(request)
    except NoRoomToLockError:
        freed = give_all_back()
        if not freed:
            raise
        return rung(replace(request, ram_budget_bytes=request.ram_budget_bytes + freed))
