"""The tensors of a safetensors file brought into one piece of memory, by several threads.

[Note: Runs]
Tensors that are kept as they are lie in memory as they do in the file, one right behind the other. So a file of a
thousand small ones is read in a few large pieces, straight to where they belong, while no thread needs Python. A tensor
that would lie there at an address which its type does not allow begins another run.

[Note: New memory]
costs the system more time than the copy into it, page by page. Where it has huge pages to give, it is asked for them:
reading from its cache is nearly twice as fast then.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from ..loaders.safetensors_header import Entry, MalformedError, read_into
from ..loaders.sizes import aligned

WIDE = (torch.float32, torch.float64)
THREADS = 8  # that read
BATCH_BYTES = 8 << 20  # that one of them reads before it asks for more
SINGLE_BYTES = 32 << 20  # what is smaller is read before other threads are there
STAGED = 1 << 15  # numbers that are read and rounded at a time: torch does so many without further threads
HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class Kept:
    """Bytes as they are in the file from `offset` on, of some of its `entries`."""

    entries: Sequence[Entry]
    offset: int
    there: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.there.nbytes

    def fill(self, file: BinaryIO) -> None:
        try:
            read_into(file, Entry("", torch.uint8, (self.nbytes,), self.offset, self.nbytes), self.there)
        except MalformedError as error:
            size = os.fstat(file.fileno()).st_size
            cut = next((entry.name for entry in self.entries if entry.offset + entry.nbytes > size), "")
            raise MalformedError(f"the file ends within tensor {cut[:80]!r}") from error


@dataclass(frozen=True)
class Rounded:
    """A tensor that is kept in another type than the file's."""

    entry: Entry
    there: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    def fill(self, file: BinaryIO) -> None:
        out = self.there.view(-1)
        staging = torch.empty(min(out.numel(), STAGED), dtype=self.entry.dtype)
        for first in range(0, out.numel(), STAGED):
            part = out[first : first + STAGED]
            read_into(file, self.entry, staging[: part.numel()], first)
            part.copy_(staging[: part.numel()])


Batch = list[Kept | Rounded]


def is_wide(dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether such a tensor is rounded to bfloat16."""
    return dtype in WIDE and sum(n > 1 for n in shape) > 1


def lay_out(entries: Sequence[Entry]) -> tuple[dict[str, torch.Tensor], list[Kept | Rounded]]:
    """A tensor for each entry, of the type that it is kept in, and what fills them, in the order of the file.

    Args:
        entries: in that order.
    """
    dtypes = [torch.bfloat16 if is_wide(entry.dtype, entry.shape) else entry.dtype for entry in entries]
    sizes = [e.nbytes // e.dtype.itemsize * dtype.itemsize for e, dtype in zip(entries, dtypes, strict=True)]
    runs: list[tuple[int, int, int]] = []  # first entry, where its bytes lie in memory, and where the last's end
    places: list[int] = []
    end = 0
    for i, (entry, dtype) in enumerate(zip(entries, dtypes, strict=True)):
        kept, before = dtype == entry.dtype, entries[i - 1]
        goes_on = kept and places and dtypes[i - 1] == before.dtype and before.offset + before.nbytes == entry.offset
        if not goes_on or end % dtype.itemsize:
            end = aligned(end)
            runs.append((i, end, end))
        places.append(end)
        end += sizes[i]
        runs[-1] = (*runs[-1][:2], end)
    with torch.inference_mode(False):  # the threads that fill it are outside of that
        memory = _memory(end)
        tensors = {}
        for entry, dtype, start, nbytes in zip(entries, dtypes, places, sizes, strict=True):
            tensors[entry.name] = memory[start : start + nbytes].view(dtype).view(entry.shape)
        jobs: list[Kept | Rounded] = []
        for i, start, stop in runs:
            if dtypes[i] != entries[i].dtype:
                jobs.append(Rounded(entries[i], tensors[entries[i].name]))
                continue
            for first in range(start, stop, BATCH_BYTES):
                there = memory[first : min(first + BATCH_BYTES, stop)]
                jobs.append(Kept(entries, entries[i].offset + first - start, there))
    return tensors, jobs


def _memory(nbytes: int) -> torch.Tensor:
    """By [Note: New memory]."""
    if nbytes >= 2 * HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # there is not so much: torch says so, nobody takes it for an error of the file
            # Not shared with children, as Python's default would have it: that is memory of another kind.
            pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without them
                pages.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(pages, dtype=torch.uint8)
    return torch.empty(nbytes, dtype=torch.uint8)


def fill(path: Path, opened: BinaryIO, jobs: Sequence[Kept | Rounded], told: Callable[[int], None]) -> None:
    """Do the jobs, each thread over the file at `path`, which has to be the one that is `opened`.

    Args:
        told: of the bytes that were read, now and then; what it raises ends the reading.

    Raises:
        MalformedError: the file ended early, or was replaced.
    """
    total = sum(job.nbytes for job in jobs)
    threads = 1 if total < SINGLE_BYTES else min(THREADS, os.cpu_count() or 1)
    one = partial(fill_batch, path, opened)
    if threads == 1:
        for batch in _batches(jobs):
            told(one(batch))
        return
    with ThreadPoolExecutor(threads, "sluice-lora") as pool:
        try:
            for nbytes in pool.map(one, _batches(jobs)):
                told(nbytes)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _batches(jobs: Sequence[Kept | Rounded]) -> Iterator[Batch]:
    """In the order of the file, which disks like, in portions for one thread each."""
    batch: Batch = []
    nbytes = 0
    for job in jobs:
        batch.append(job)
        nbytes += job.nbytes
        if nbytes >= BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    yield batch


def fill_batch(path: Path, opened: BinaryIO, batch: Batch) -> int:
    """Read what is in the batch; its bytes."""
    with path.open("rb", buffering=0) as file:  # a place to read at of its own
        if not os.path.sameopenfile(file.fileno(), opened.fileno()):
            raise MalformedError("it was replaced while it was read")
        for job in batch:
            job.fill(file)
    return sum(job.nbytes for job in batch)
