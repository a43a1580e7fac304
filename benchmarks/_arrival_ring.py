"""A way to the GPU that locks no page of the file: threads read the file's cache into a ring of pinned memory.

What `arrival.py` compares with locking. Reading costs a copy by the CPU, of which several threads do as many bytes as
the link takes; to lock costs the driver's time, beside which nothing is copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from pack.offload import stretches
from pack.offload.device import Device, Event
from pack.offload.files import OpenFiles, Weight
from pack.offload.host_memory import HostBuffer

MIB = 1 << 20


@dataclass
class Ring:
    """`places` pieces of `mib` MiB, filled by `threads`; `keep`: the memory stays pinned from turn to turn."""

    mib: int
    places: int
    threads: int
    keep: bool = False
    _kept: HostBuffer | None = field(default=None, repr=False)

    def __str__(self) -> str:
        kept = ", kept" if self.keep else ""
        return f"ring of {self.mib} MiB x {self.places}, {self.threads} threads{kept}"

    def __call__(self, weights: Mapping[int, Weight], device: Device) -> object:
        buffer = self._kept or HostBuffer(self.mib * MIB * self.places)
        if buffer is not self._kept:
            buffer.pin(device.registrar)
        self._kept = buffer if self.keep else None
        files = OpenFiles(weights.values())
        try:
            return self._cross(weights, device, files, buffer)
        finally:
            files.close()
            if not self.keep:
                buffer.close()

    def _cross(
        self, weights: Mapping[int, Weight], device: Device, files: OpenFiles, buffer: HostBuffer
    ) -> dict[int, torch.Tensor]:
        stretches.STRETCH_BYTES = self.mib * MIB
        todo, opened = stretches.cut(weights), {file.stored: file for file in files.all()}
        copying, there = device.new_copy_stream(), dict[int, torch.Tensor]()
        events: dict[int, Event] = {}

        def fill(k: int) -> torch.Tensor:
            place, stretch = k % self.places, todo[k]
            if k >= self.places:
                device.synchronize(events[k - self.places])
            start, nbytes = place * self.mib * MIB, stretch.stop - stretch.start
            opened[stretch.file].read_into(buffer.view[start : start + nbytes], stretch.start)
            return buffer.data[start : start + nbytes]

        filled: deque[Future[torch.Tensor]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            filled.extend(pool.submit(fill, k) for k in range(min(self.places, len(todo))))
            for k, stretch in enumerate(todo):
                for part in stretch.parts:
                    if part.number not in there:
                        there[part.number] = device.allocate(weights[part.number].nbytes)
                data = filled.popleft().result()
                with device.on(copying):
                    for part in stretch.parts:
                        out = there[part.number][part.start : part.stop]
                        begin = part.offset - stretch.start
                        device.copier(out, data[begin : begin + out.nbytes])()
                events[k] = device.new_event()
                device.record(events[k], copying)
                if k + self.places < len(todo):
                    filled.append(pool.submit(fill, k + self.places))
            device.synchronize(copying)
        return there
