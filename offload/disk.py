"""Weights that are in no memory: threads read them ahead into a ring of pinned slots, and the GPU copies from there.

The order in which weights are asked for is that of the plan, step after step, so the threads read on in that order as
far as slots are free, through the end of a step and during the pauses between two. Reads carry numbers that only grow:
number n is part n of the stream modulo its length. When something else is asked for, the numbers go on from there, and
a read that is still under way for a smaller number gives its slot back unused.

    taken <= n < assigned: being read or read        a slot is free again when its copy to the GPU is done;
                                                     a reader waits for that, never the thread that computes

Files larger than free RAM are read past the page cache, which could only be filled in vain.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ..loaders.read_ahead import PATIENCE
from ..loaders.sizes import aligned, size
from .device import Device, Event, Stream
from .errors import RefusedError
from .files import DIRECT_ALIGN, Key, OpenFiles, Weight, WeightFile, streamed_bytes
from .host_memory import HostBuffer, HostSource, Request, hold_memory

RING_BYTES = 256 << 20
PART_BYTES = 8 << 20
SLOT_BYTES = PART_BYTES + 2 * DIRECT_ALIGN  # a part begins and ends anywhere, direct reads do not
FEWEST_SLOTS = 4


@dataclass(frozen=True)
class Part:
    """Some bytes of a weight, and where in the weight they belong."""

    file: WeightFile
    offset: int
    nbytes: int
    start: int

    @property
    def skipped(self) -> int:
        """Bytes before the part that are read with it, to begin on a boundary."""
        return self.offset % DIRECT_ALIGN


class Slot:
    """A place in the ring for one part."""

    def __init__(self, ring: HostBuffer, number: int, event: Event) -> None:
        place = slice(number * SLOT_BYTES, (number + 1) * SLOT_BYTES)
        self.view, self.data = ring.view[place], ring.data[place]
        self.event, self.in_flight = event, False


def disk(request: Request) -> DiskSource:
    """Reads from disk all the time."""
    if not request.in_files:
        raise RefusedError("no weight is in a file")
    slots = min(RING_BYTES, request.ram_budget_bytes) // SLOT_BYTES
    return DiskSource(request, max(slots, FEWEST_SLOTS))


class DiskSource:
    """Reader threads and their ring. Weights in plain memory are copied from there."""

    kind = "disk"

    def __init__(self, request: Request, slots: int) -> None:
        self._device: Device = request.device
        self._watch = request.watch
        self._files = OpenFiles(request.weights.values())
        self._memory = HostSource("memory", request.device, OpenFiles(()))
        self._parts: list[Part] = []
        self._places: dict[Key, tuple[int, int]] = {}
        for key, weight in request.in_files.items():
            first = len(self._parts)
            self._parts.extend(_parts(self._files.of(weight), weight))
            self._places[key] = first, len(self._parts)

        try:
            self._ring = HostBuffer(slots * SLOT_BYTES)
        except RefusedError:
            self._files.close()
            raise
        self.pinned_bytes = 0
        pinning = self._pin(request)
        self._slots = [Slot(self._ring, number, self._device.new_event()) for number in range(slots)]
        self._memory.pinned_bytes = self.pinned_bytes
        try:
            others = hold_memory(self._memory, request)
        except BaseException:
            self._give_up()
            raise
        self.pinned_bytes = self._memory.pinned_bytes

        total = streamed_bytes(request.in_files)
        past_cache = total > request.free_ram_bytes and all(file.read_directly() for file in self._files.all())
        self.reason = (
            f"{request.threads} threads read {size(total)} a step into a ring of {self._ring.data.nbytes >> 20} "
            f"MiB ({pinning}{', past the page cache' if past_cache else ''}){others}"
        )

        self._changed = threading.Condition()
        self._free = deque(self._slots)
        self._read: dict[int, Slot | Exception] = {}
        self._taken = self._assigned = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"sluice-read-{number}", daemon=True)
            for number in range(min(request.threads, slots))
        ]
        for thread in self._threads:
            thread.start()

    def _pin(self, request: Request) -> str:
        if not request.may_pin:
            return "pageable: pinned memory is switched off"
        if self._ring.data.nbytes > request.ram_budget_bytes:
            return f"pageable: only {request.ram_budget_bytes >> 20} MiB may be pinned"
        try:
            self._ring.pin(self._device.registrar)
        except RefusedError as refusal:
            return f"pageable: {refusal}"
        self.pinned_bytes = self._ring.data.nbytes
        return "pinned"

    def ready(self, block: int, tensor: int) -> bool:
        key = block, tensor
        if key not in self._places:
            return True
        first, end = self._places[key]
        with self._changed:
            begin = self._seek(first)
            numbers = range(begin, begin + min(end - first, len(self._slots)))
            return all(number in self._read for number in numbers)

    def copier(self, block: int, tensor: int, out: torch.Tensor, stream: Stream) -> Callable[[], object]:
        key = block, tensor
        if key not in self._places:
            return self._memory.copier(block, tensor, out, stream)
        return partial(self._copy, key, out, stream)

    def _copy(self, key: Key, out: torch.Tensor, stream: Stream) -> None:
        first, end = self._places[key]
        with self._changed:
            begin = self._seek(first)
        for number, part in enumerate(self._parts[first:end], begin):
            slot = self._take(number)
            data = slot.data[part.skipped : part.skipped + part.nbytes]
            self._device.copier(out[part.start : part.start + part.nbytes], data)()
            self._device.record(slot.event, stream)
            slot.in_flight = True
            with self._changed:
                self._free.append(slot)
                self._changed.notify_all()

    def _seek(self, first: int) -> int:
        """The number of the next read of part `first`; what would have come before it is dropped."""
        number = self._taken + (first - self._taken) % len(self._parts)
        self._drop_before(number)
        if number > self._assigned:
            self._assigned = number
        self._changed.notify_all()
        return number

    def _drop_before(self, number: int) -> None:
        for earlier in [n for n in self._read if n < number]:
            found = self._read.pop(earlier)
            if isinstance(found, Slot):
                self._free.append(found)
        self._taken = max(self._taken, number)

    def _take(self, number: int) -> Slot:
        with self._changed:
            while number not in self._read:
                if not self._changed.wait(PATIENCE):
                    with self._watch("reading", 0) as told:
                        told(0)  # whoever watches may have had enough of a disk that hangs
            found = self._read.pop(number)
            self._taken = number + 1
            if isinstance(found, Slot):
                return found
            # What was read ahead failed as well, or belongs to what nobody will ask for next.
            self._drop_before(self._assigned)
        raise found

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not (self._free and self._assigned < self._taken + len(self._slots)):
                    self._changed.wait()
                if self._closed:
                    return
                number, slot = self._assigned, self._free.popleft()
                self._assigned += 1
            found: Slot | Exception = slot
            try:
                self._fill(slot, self._parts[number % len(self._parts)])
            except Exception as error:  # raised where the bytes are needed
                found = error
            with self._changed:
                wanted = number >= self._taken
                if wanted:
                    self._read[number] = found
                if not (wanted and found is slot):
                    self._free.append(slot)
                self._changed.notify_all()

    def _fill(self, slot: Slot, part: Part) -> None:
        if slot.in_flight:
            self._device.synchronize(slot.event)
            slot.in_flight = False
        needed = part.skipped + part.nbytes
        whole = aligned(needed, DIRECT_ALIGN)
        part.file.read_into(slot.view[:whole], part.offset - part.skipped, needed)

    def copy_of(self, block: int, tensor: int) -> None: ...

    def check(self) -> None:
        self._files.check()

    def close(self) -> None:
        if self._closed:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._read.clear()
        self._free.clear()
        self._slots.clear()
        self._give_up()

    def _give_up(self) -> None:
        self._memory.close()
        self._ring.close()
        self._files.close()


def _parts(file: WeightFile, weight: Weight) -> Iterator[Part]:
    for start in range(0, weight.nbytes, PART_BYTES):
        yield Part(file, weight.offset + start, min(PART_BYTES, weight.nbytes - start), start)
