"""What an arrival is made of, each part timed alone: page tables, locking, allocating, copying, and the way back.

A part is timed while the others are done, or are left out. Two more rows ask whether a call of the driver waits for
what the GPU computes meanwhile: they are timed beside a kernel of some milliseconds.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from pack.offload.device import Device
from pack.offload.files import OpenFiles, Weight
from pack.offload.page_cache import RegisteredFile, used_spans

MIB = 1 << 20
POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14
BUSY_SECONDS = 0.1
PAGES = ((32, 1), (128, 1), (128, 2), (128, 4), (1024, 1))  # MiB in one call, and threads

Span = tuple[int, int]


def cut(spans: Iterable[Span], length: int) -> list[Span]:
    return [(at, min(at + length, stop)) for start, stop in spans for at in range(start, stop, length)]


def populate(mapped: RegisteredFile, span: Span) -> int:
    """Have the kernel map the cached pages of a span; 0 or an error of the system."""
    libc = ctypes.CDLL(None, use_errno=True)
    address, nbytes = mapped.data.data_ptr() + span[0], span[1] - span[0]
    failed = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), POPULATE_READ)
    return ctypes.get_errno() if failed else 0


def each(threads: int, work: Callable[[Any], object], items: Sequence[Any]) -> float:
    """The seconds that `threads` take to do `work` on every item."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))  # started
        start = time.perf_counter()
        for _ in pool.map(work, items):
            pass
        return time.perf_counter() - start


@dataclass
class Parts:
    """Times parts on one file; `synchronize` and `empty_cache` are the device's."""

    weights: Mapping[int, Weight]
    device: Device
    synchronize: Callable[[], object]
    empty_cache: Callable[[], object]
    keep_busy: Callable[[float], object]  # enqueue a kernel of so many seconds

    def rows(self) -> dict[str, float]:
        """Seconds of each part."""
        found: dict[str, float] = {}
        for mib, threads in PAGES:
            found.update(self._pages(f"{mib:4} MiB, {threads} threads", mib * MIB, threads))
        found.update(self._memory())
        found.update(self._busy())
        return found

    def _mapped(self) -> RegisteredFile:
        files = OpenFiles(self.weights.values())
        (file,) = files.all()
        mapped = RegisteredFile(file, self.device.registrar)
        files.close()
        return mapped

    def _spans(self, length: int) -> list[Span]:
        (size,) = {weight.file.size for weight in self.weights.values() if weight.file is not None}
        return cut(used_spans(self.weights.values(), size), length)

    def _pages(self, name: str, length: int, threads: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for way in ("", ", populated before"):
            mapped = self._mapped()
            found.update(_pages(mapped, self._spans(length), name, way, threads))
            mapped.close()
        return found

    def _memory(self) -> dict[str, float]:
        found, mapped = {}, self._mapped()
        for span in self._spans(128 * MIB):
            mapped.lock(*span)
        self.empty_cache()
        start = time.perf_counter()
        there = {number: self.device.allocate(weight.nbytes) for number, weight in self.weights.items()}
        self.synchronize()
        found["allocate"] = time.perf_counter() - start
        pieces = {number: mapped.pieces(weight) for number, weight in self.weights.items()}
        for again in ("", ", again"):
            start = time.perf_counter()
            for number, parts in pieces.items():
                for at, data in parts:
                    there[number][at : at + data.nbytes].copy_(data, non_blocking=True)
            self.synchronize()
            found[f"copy of locked pages{again}"] = time.perf_counter() - start
        start = time.perf_counter()
        there.clear()
        self.empty_cache()
        found["free"] = time.perf_counter() - start
        del parts, data
        pieces.clear()
        mapped.close()
        return found

    def _busy(self) -> dict[str, float]:
        """Each call beside a kernel of BUSY_SECONDS."""
        mapped, (span, *_) = self._mapped(), self._spans(128 * MIB)
        place: list[torch.Tensor] = []

        def free() -> None:
            place.clear()
            self.empty_cache()

        calls: dict[str, Callable[[], object]] = {
            "lock 128 MiB": lambda: mapped.lock(*span),
            "unlock 128 MiB": lambda: mapped.unlock(span[0]),
            "allocate 128 MiB": lambda: place.append(self.device.allocate(128 * MIB)),
            "free 128 MiB": free,
        }
        found = {}
        self.empty_cache()
        for name, call in calls.items():
            self.keep_busy(BUSY_SECONDS)
            start = time.perf_counter()
            call()
            found[f"{name} beside a kernel of {BUSY_SECONDS * 1e3:.0f} ms"] = time.perf_counter() - start
            self.synchronize()
        mapped.close()
        return found


def _pages(mapped: RegisteredFile, spans: Sequence[Span], name: str, way: str, threads: int) -> dict[str, float]:
    found, failed = {}, []
    if way:
        seconds = each(threads, lambda span: failed.append(populate(mapped, span)), spans)
        if not any(failed):  # or else this kernel does not know it
            found[f"populate {name}"] = seconds
    found[f"lock     {name}{way}"] = each(threads, lambda span: mapped.lock(*span), spans)
    found[f"unlock   {name}{way}"] = each(threads, lambda span: mapped.unlock(span[0]), spans)
    return found
