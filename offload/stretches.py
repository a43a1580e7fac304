"""Copy weights from their file to the device through its cached pages, locked no longer than they are copied.

Locking a page takes about as long as copying it does over a fast link, so the file is taken in *stretches*, and three
things happen at a time:

    a thread      locks the stretches that come next
    the caller    allocates, and enqueues the copies of what is locked
    a thread      unlocks what has been copied

Only a few stretches are locked at any moment, however large the file is: other programs lose nothing but that. What
that saves is small, because the driver locks more slowly while it copies, and to unlock waits for whatever the GPU is
at: on an H200, 6 GB take twice the time of their copy (benchmarks/results/arrival_h200.txt). Threads that copy into a
ring of memory that stays locked are hardly faster there, 1.74 times at best, and need that memory. So what is to be
copied again soon stays locked (`kept`), and takes the copy alone then: `under_way` enqueues it and waits for nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from ..loaders.read_ahead import Told, patiently
from .device import Device, Event
from .errors import RefusedError
from .files import OpenFiles, StoredFile, Weight
from .kept import Cell, KeptPages, cells
from .page_cache import RegisteredFile, used_spans
from .pieces import PIECE_BYTES, Pieces

STRETCH_BYTES = 128 << 20
AHEAD = 3  # stretches that are locked, or about to be, before their copies are enqueued
LOCKED = 8  # at once
LOCKERS = 1  # threads: several lock no faster, and the stretch itself matters little (results/arrival_h200.txt)


@dataclass(frozen=True)
class Part:
    """Bytes `start` to `stop` of weight `number`, and where in the file they begin."""

    number: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Stretch:
    """Whole pages of a file from `start` to `stop`, and the parts of weights on them."""

    file: StoredFile
    start: int
    stop: int
    parts: list[Part] = field(default_factory=list)


def cut(weights: Mapping[int, Weight], whole_cells: bool = False) -> list[Stretch]:
    """The stretches of the files of `weights`, in order; every byte of a weight is in one part of one of them.

    Args:
        whole_cells: as `kept` cuts files; otherwise only pages with weights on them are in any.
    """
    stretches: list[Stretch] = []
    for file in dict.fromkeys(weight.file for weight in weights.values() if weight.file is not None):
        of_file = {number: weight for number, weight in weights.items() if weight.file == file}
        if whole_cells:
            own = [Stretch(*cell) for cell in sorted({cell for w in of_file.values() for cell in cells(w)}, key=_start)]
        else:
            own = [
                Stretch(file, start, min(start + STRETCH_BYTES, end))
                for begin, end in used_spans(of_file.values(), file.size)
                for start in range(begin, end, STRETCH_BYTES)
            ]
        starts = [stretch.start for stretch in own]
        for number, weight in of_file.items():
            done = 0
            while done < weight.nbytes:
                stretch = own[bisect_right(starts, weight.offset + done) - 1]
                end = min(stretch.stop - weight.offset, weight.nbytes)
                stretch.parts.append(Part(number, done, end, weight.offset + done))
                done = end
        stretches.extend(own)
    return stretches


def _start(cell: Cell) -> int:
    return cell[1]


def copied(
    weights: Mapping[int, Weight], device: Device, told: Told, kept: KeptPages | None = None
) -> tuple[dict[int, torch.Tensor], str]:
    """The bytes of `weights` on the device (uint8, flat), complete when this returns.

    Args:
        weights: in files, by a number of the caller's.
        told: of the weights that arrived; what it raises leaves nothing on the device, and locked only what is kept.
        kept: what is locked already, and where what is locked now may stay so.

    Returns:
        The weights that arrived, and why the others did not: from some page on, locking was refused.

    Raises:
        torch.OutOfMemoryError: nothing of them stays on the device.
        SourceError: a file is not what was loaded.
    """
    try:
        crossing = Crossing(weights, device, OpenFiles(weights.values()), kept)
    except RefusedError as refused:
        return {}, str(refused)
    try:
        refusal = crossing.go(told)
        crossing.finish()
        return crossing.arrived(), refusal
    finally:
        crossing.close()


def under_way(weights: Mapping[int, Weight], device: Device, kept: KeptPages) -> Crossing | None:
    """All copies of `weights` enqueued; None where some page is not locked. What the calling thread computes from now
    on comes after them. It must `finish` when it needs the CPU to know that, and `close` in any case.

    Raises:
        torch.OutOfMemoryError: nothing of them stays on the device.
        SourceError: a file cannot be opened, or is not what was loaded.
    """
    crossing = Crossing(weights, device, OpenFiles(weights.values()), kept)
    try:
        if crossing.go_at_once():
            return crossing
    except BaseException:
        crossing.close()
        raise
    crossing.close()
    return None


class Crossing:
    """The weights on their way. It closes `files`, also where it raises RefusedError: one of them cannot be mapped."""

    def __init__(
        self, weights: Mapping[int, Weight], device: Device, files: OpenFiles, kept: KeptPages | None = None
    ) -> None:
        self._weights, self._device, self._files = weights, device, files
        self._kept = kept.use(device) if kept is not None else None
        mapped = self._kept.mapped if self._kept is not None else lambda file: RegisteredFile(file, device.registrar)
        self._mapped: dict[StoredFile, RegisteredFile] = {}
        self._locked: dict[tuple[StoredFile, int], RegisteredFile] = {}  # what is to be unlocked, by its beginning
        try:
            self._mapped.update((file.stored, mapped(file)) for file in files.all())
        except BaseException:
            self._let_go()
            raise
        self._stretches = cut(weights, whole_cells=self._kept is not None)
        self._left = {number: weight.nbytes for number, weight in weights.items()}
        nbytes = {number: weight.nbytes for number, weight in weights.items()}
        offsets = {number: weight.offset for number, weight in weights.items()} if len(self._mapped) == 1 else {}
        self._pieces = Pieces(nbytes, device, PIECE_BYTES if kept is not None else 0, offsets)
        self._places: dict[int, torch.Tensor] = {}
        self._copying, self._allocated = device.new_copy_stream(), device.new_event()
        self._locker, self._unlocker = (ThreadPoolExecutor(LOCKERS, f"sluice-{what}") for what in ("lock", "unlock"))

    def go(self, told: Told) -> str:
        """Copy as much as can be locked; why that is not all, or nothing."""
        refusal = ""
        locks: deque[Future[str]] = deque()  # of the stretches from this one on
        unlocks: deque[Future[int]] = deque()  # of those before it
        waiting = deque(self._stretches)
        for stretch in self._stretches:
            while waiting and len(locks) < AHEAD:
                if len(locks) + len(unlocks) >= LOCKED:
                    told(patiently(unlocks.popleft(), told))
                locks.append(self._locker.submit(self._lock, waiting.popleft()))
            refusal = patiently(locks.popleft(), told)
            if refusal:
                break
            unlocks.append(self._unlocker.submit(self._unlock, stretch, *self._enqueue(stretch)))
        while unlocks:
            told(patiently(unlocks.popleft(), told))
        return refusal

    def go_at_once(self) -> bool:
        """Enqueue all copies of what is locked already, and have what the caller computes come after them; whether all
        was."""
        if self._kept is None or not all((one.file, one.start, one.stop) in self._kept for one in self._stretches):
            return False
        done = None
        for stretch in self._stretches:
            if self._lock(stretch):
                return False
            done, _ = self._enqueue(stretch)
        if done is not None:
            self._device.wait(self._device.compute_stream(), done)
        return True

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(weight.nbytes for weight in self._weights.values())

    def finish(self) -> None:
        """Wait for what is enqueued.

        Raises:
            SourceError: a file was changed meanwhile.
        """
        self._device.synchronize(self._copying)
        self._files.check()

    def _lock(self, stretch: Stretch) -> str:
        """Why that was refused, or nothing."""
        file, start, stop = stretch.file, stretch.start, stretch.stop
        try:
            if self._kept is None or not self._kept.lock((file, start, stop)):
                self._mapped[file].lock(start, stop)
                self._locked[file, start] = self._mapped[file]
        except RefusedError as refusal:
            return str(refusal)
        return ""

    def _enqueue(self, stretch: Stretch) -> tuple[Event, int]:
        """Copy what is on the stretch; the event after that, and the bytes of the weights that are complete then."""
        for part in stretch.parts:
            if part.number not in self._places:
                self._places[part.number] = self._pieces.place(part.number)
        # The allocator may hand out memory that kernels enqueued earlier still use.
        self._device.record(self._allocated, self._device.compute_stream())
        self._device.wait(self._copying, self._allocated)
        mapped, complete = self._mapped[stretch.file], 0
        with self._device.on(self._copying):
            for number, begin, offset, nbytes in self._joined(stretch.parts):
                place = self._pieces.piece(number)[begin : begin + nbytes]
                self._device.copier(place, mapped.data[offset : offset + nbytes])()
            for part in stretch.parts:
                self._left[part.number] -= part.stop - part.start
                complete += 0 if self._left[part.number] else self._weights[part.number].nbytes
        done = self._device.new_event()
        self._device.record(done, self._copying)
        return done, complete

    def _joined(self, parts: Sequence[Part]) -> list[tuple[int, int, int, int]]:
        """The copies that bring `parts`: one of the weights, where in its piece each begins, where in the file, and
        its bytes. Of hundreds more the driver would let the caller wait until most are done."""
        copies: list[tuple[int, int, int, int]] = []
        before = -1
        for part in parts:
            if copies and self._pieces.beside(part.number, before):
                number, begin, offset, _ = copies[-1]
                copies[-1] = number, begin, offset, part.offset + part.stop - part.start - offset
            else:
                begin = self._pieces.start(part.number) + part.start
                copies.append((part.number, begin, part.offset, part.stop - part.start))
            before = part.number
        return copies

    def _unlock(self, stretch: Stretch, done: Event, complete: int) -> int:
        self._device.synchronize(done)
        if (mapped := self._locked.pop((stretch.file, stretch.start), None)) is not None:
            mapped.unlock(stretch.start)
        return complete

    def arrived(self) -> dict[int, torch.Tensor]:
        return {number: place for number, place in self._places.items() if not self._left[number]}

    def close(self) -> None:
        """Wait for what is under way, and let go of everything but what `arrived` gave."""
        self._locker.shutdown(wait=True, cancel_futures=True)
        self._device.synchronize(self._copying)
        self._unlocker.shutdown(wait=True)
        self._places = {}
        self._pieces.clear()
        self._let_go()

    def _let_go(self) -> None:
        for (_, start), mapped in self._locked.items():
            mapped.unlock(start)
        if self._kept is not None:
            self._kept.close()
        else:
            for mapped in self._mapped.values():
                mapped.close()
        self._files.close()
