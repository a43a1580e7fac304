"""The kernel's own cache of the file as the pinned memory: registered read-only, copied by the GPU, no copy in RAM.

The mapping is this module's own, read-only and shared. Never a private writable one: registering it succeeds, and
quietly copies every page of it into anonymous memory. Only the pages that streamed weights lie on are registered, in
pieces of a bounded size. The CPU never touches the mapping, so that a file that is cut off meanwhile cannot kill the
process: the registered pages stay until they are unregistered, and `check` reports the change.

Of a model that leaves VRAM for a stage and comes back, the pages stay registered in between (`kept`).

Registering reads what is not cached, with nobody told and at less than the disk's speed; so that is read before.
"""

from __future__ import annotations

import mmap
import time
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..loaders.read_ahead import Told, read_ahead
from ..loaders.sizes import size
from .errors import NoRoomToLockError, RefusedError
from .files import Key, OpenFiles, StoredFile, Weight, WeightFile, streamed_bytes
from .host_memory import HostSource, Request, hold_memory
from .living import Living
from .registration import Registrar

if TYPE_CHECKING:
    from .kept import Use

REGISTER_BYTES = 1 << 30
PAGE = mmap.PAGESIZE
SHARE_OF_FREE_RAM = 0.8  # locked pages cannot be evicted: what other programs and this one still need must fit beside


def page_cache(request: Request) -> HostSource:
    """Registers the files' pages in place. RefusedError where driver, GPU, system or settings do not allow it."""
    in_files = request.in_files
    _refuse(request, in_files)
    began = time.perf_counter()
    source = HostSource("page_cache", request.device, OpenFiles(request.weights.values()))
    try:
        kept = _of_kept(request, source)
        for file in source.files.all() if kept is None else ():
            weights = {key: weight for key, weight in in_files.items() if weight.file == file.stored}
            mapped = RegisteredFile(file, request.device.registrar)
            source.owners.append(mapped)
            spans = used_spans(weights.values(), file.stored.size)
            read_ahead(file.fileno(), spans, request.watch, file.stored.path.name)
            total = sum(stop - start for start, stop in spans)
            with request.watch(f"locking {file.stored.path.name} in memory", total) as told:
                mapped.register(spans, told)
            source.pieces.update((key, mapped.pieces(weight)) for key, weight in weights.items())
        others = hold_memory(source, request)
    except BaseException:
        source.close()
        raise
    source.reason = (
        f"registered {size(streamed_bytes(in_files))} of the file's cached pages "
        f"in {time.perf_counter() - began:.2f} s{kept or ''}{others}"
    )
    return source


def _of_kept(request: Request, source: HostSource) -> str | None:
    """Take the weights in files from pages that stay locked: what to add to the source's reason. None where there are
    none, or no room for all that would be missing."""
    use = request.kept.use(request.device) if request.kept is not None else None
    if use is None:
        return None
    source.owners.append(use)
    mapped = {file.stored: use.mapped(file) for file in source.files.all()}
    wanted = use.cells(request.in_files.values())
    missing = [cell for cell in wanted if cell not in use]
    total = sum(stop - start for _, start, stop in missing)
    if not use.has_room(total):
        _without(use, source)
        return None
    for file in source.files.all():
        spans = [(start, stop) for stored, start, stop in missing if stored == file.stored]
        read_ahead(file.fileno(), spans, request.watch, file.stored.path.name)
    with request.watch("locking weights in memory", total) if total else nullcontext(_nobody) as told:
        for cell in wanted:
            new = cell not in use
            try:
                locked = use.lock(cell)
            except RefusedError:
                _without(use, source)
                raise
            if not locked:
                _without(use, source)
                return None
            told(cell[2] - cell[1] if new else 0)
    source.pieces.update((key, mapped[w.file].pieces(w)) for key, w in request.in_files.items() if w.file is not None)
    return ", which stay registered while the model is out of VRAM for a stage"


def _without(use: Use, source: HostSource) -> None:
    """The source does without pages that stay locked: let go of them, for it may need the room itself."""
    source.owners.remove(use)
    use.give_back()


def _nobody(nbytes: int) -> None: ...


def _refuse(request: Request, in_files: dict[Key, Weight]) -> None:
    if not in_files:
        raise RefusedError("no weight is in a file")
    if not request.may_pin:
        raise RefusedError("pinned memory is switched off")
    # Pages that are locked count as free, but cannot be had.
    others = locked_bytes(beside={weight.file for weight in in_files.values()})
    needed, room = streamed_bytes(in_files), max(0, int(request.free_ram_bytes * SHARE_OF_FREE_RAM) - others)
    if needed > room:
        raise NoRoomToLockError(f"{size(needed)} of the file would be locked in RAM, which has room for {size(room)}")
    if refusal := request.device.registrar.read_only_refusal():
        raise RefusedError(refusal)


def used_spans(weights: Iterable[Weight], size: int) -> list[tuple[int, int]]:
    """The pages that the weights lie on, as (start, end) in the file; neighbours are one span."""
    spans: list[tuple[int, int]] = []
    for weight in sorted(weights, key=lambda weight: weight.offset):
        start = weight.offset // PAGE * PAGE
        end = min(-(-(weight.offset + weight.nbytes) // PAGE) * PAGE, size)
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        elif weight.nbytes:
            spans.append((start, end))
    return spans


_all: Living[RegisteredFile] = Living()


def locked_bytes(beside: Container[StoredFile | None] = ()) -> int:
    """RAM that is locked for files now, without those in `beside`. What two GPUs have locked is there once."""
    of_files: Counter[StoredFile] = Counter()
    for one in _all.all():
        if one.stored not in beside:
            of_files[one.stored] += one.locked
    return sum(min(nbytes, file.size) for file, nbytes in of_files.items())


class RegisteredFile:
    """A mapping of one file and the ranges of it that are registered. RefusedError where it cannot be mapped."""

    def __init__(self, file: WeightFile, registrar: Registrar) -> None:
        try:
            self._map = mmap.mmap(file.fileno(), file.stored.size, access=mmap.ACCESS_READ)
        except OSError as error:  # no address space, or a file system without mappings
            raise RefusedError(f"the file cannot be mapped ({error.strerror})") from error
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self.data = torch.from_numpy(np.frombuffer(self._map, dtype=np.uint8))
        self.stored, self._registrar = file.stored, registrar
        self._ends: dict[int, int] = {}  # of every registered range
        self._ranges: list[tuple[int, int]] | None = None  # the same in order, if nothing changed since
        _all.add(self)

    @property
    def locked(self) -> int:
        """Bytes that are registered."""
        return sum(stop - start for start, stop in self._ends.copy().items())

    def register(self, spans: list[tuple[int, int]], told: Told = lambda nbytes: None) -> None:
        for begin, end in spans:
            for start in range(begin, end, REGISTER_BYTES):
                stop = min(start + REGISTER_BYTES, end)
                self.lock(start, stop)
                told(stop - start)

    def lock(self, start: int, stop: int) -> None:
        """Register one range, from the beginning of a page on."""
        self._registrar.register(self.data.data_ptr() + start, stop - start, read_only=True)
        self._ends[start] = stop
        self._ranges = None

    def unlock(self, start: int) -> None:
        """Undo `lock`. No copy from there may be under way."""
        self._registrar.unregister(self.data.data_ptr() + start)
        del self._ends[start]
        self._ranges = None

    def pieces(self, weight: Weight) -> list[tuple[int, torch.Tensor]]:
        """A weight, cut where a registration ends: one copy may not read from two."""
        return [(start - weight.offset, self.data[start:stop]) for start, stop in self._cut(weight)]

    def _cut(self, weight: Weight) -> Iterator[tuple[int, int]]:
        ranges, last = self._ranges, weight.offset + weight.nbytes
        if ranges is None:
            ranges = self._ranges = sorted(self._ends.items())
        for begin, end in ranges[max(0, bisect_right(ranges, (weight.offset, self.stored.size)) - 1) :]:
            if begin >= last:
                break
            start, stop = max(begin, weight.offset), min(end, last)
            if start < stop:
                yield start, stop

    def close(self) -> None:
        for start in list(self._ends):
            self.unlock(start)
        del self.data
        self._map.close()
