"""Read the parts of a file that the system has not in its cache, before somebody touches the mapping of them.

A mapped weight is read when it is touched: page by page, inside a call of the driver or of torch that tells nobody how
far it is and that nothing can end. What is read here first, in pieces and by several threads, arrives at the disk's
full speed, and between two pieces whoever watches is told and may end the work. What is in the cache already costs
one system call for each 2 MiB.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")
Span = tuple[int, int]  # start and end in a file

Told = Callable[[int], None]  # how many bytes more are done; 0 now and then while none are. Raises to end the work.
Watch = Callable[[str, int], AbstractContextManager[Told]]  # around work of a name and so many bytes

PIECE_BYTES = 4 << 20
PROBE_BYTES = 2 << 20  # one page of so many bytes tells whether they are cached
THREADS = 4
PATIENCE = 0.2  # seconds between two looks at whether to go on


@contextmanager
def unwatched(what: str, total: int) -> Iterator[Told]:
    yield lambda nbytes: None


def read_ahead(descriptor: int, spans: Iterable[Span], watch: Watch, name: str) -> int:
    """Bring `spans` of an open file into the system's cache.

    Args:
        watch: told of the bytes that had to be read; not called if there are none. What it raises ends the reading,
            with no thread left.

    Returns:
        The bytes that had to be read. Errors of the disk and a file that ends early are left to whoever needs them.
    """
    pieces = cold_pieces(descriptor, spans)
    if not pieces:
        return 0
    total = sum(stop - start for start, stop in pieces)
    with watch(f"reading {name}", total) as told:
        pool = concurrent.futures.ThreadPoolExecutor(min(THREADS, len(pieces)), "sluice-ahead")
        try:
            own = threading.local()
            for job in [pool.submit(_read, descriptor, piece, own) for piece in pieces]:
                told(patiently(job, told))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return total


def patiently(job: concurrent.futures.Future[T], told: Told) -> T:
    """The result of `job`; who watches is asked meanwhile."""
    while True:
        try:
            return job.result(PATIENCE)
        except concurrent.futures.TimeoutError:
            if job.done():  # in newer Pythons this is also an error of the system, which the job may have had
                return job.result()
            told(0)


def cold_pieces(descriptor: int, spans: Iterable[Span]) -> list[Span]:
    """What of `spans` is to be read, in order; nothing where the system does not tell what it has cached."""
    cached = _cached(descriptor)
    return [] if cached is None else [piece for piece in _pieces(spans) if not _all_cached(piece, cached)]


def _pieces(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans without overlap, neighbours joined, and cut to a length that takes no second to read."""
    begin = end = 0
    for start, stop in [*sorted(spans), (-1, -1)]:
        if begin <= start <= end + PROBE_BYTES:
            end = max(end, stop)
            continue
        yield from ((at, min(at + PIECE_BYTES, end)) for at in range(begin, end, PIECE_BYTES))
        begin, end = start, stop


def _all_cached(piece: Span, cached: Callable[[int], bool]) -> bool:
    start, stop = piece
    return all(cached(at) for at in [*range(start, stop, PROBE_BYTES), stop - 1])


def _read(descriptor: int, piece: Span, own: threading.local) -> int:
    start, stop = piece
    if not hasattr(own, "memory"):
        own.memory = memoryview(bytearray(PIECE_BYTES))
    done = start
    while done < stop:
        try:
            count = os.preadv(descriptor, [own.memory[: stop - done]], done)
        except OSError:
            break
        if not count:
            break
        done += count
    return stop - start


# --- what the system has cached


def _cached(descriptor: int) -> Callable[[int], bool] | None:
    """Whether the byte at an offset is in the cache; None where the system or the file system cannot tell."""
    if not os.fstat(descriptor).st_size:
        return None
    return _by_reading(descriptor) or _by_mapping(descriptor)


def _by_reading(descriptor: int) -> Callable[[int], bool] | None:
    """By reads that must not wait for the disk; NFS and FUSE know none."""
    flag, byte = getattr(os, "RWF_NOWAIT", None), bytearray(1)
    if flag is None:
        return None

    def cached(offset: int) -> bool:
        try:
            os.preadv(descriptor, [byte], offset, flag)
        except BlockingIOError:
            return False
        except OSError:
            return True  # whoever needs the byte will say what is wrong
        return True

    try:
        os.preadv(descriptor, [byte], 0, flag)
    except BlockingIOError:
        return cached
    except OSError:
        return None
    return cached


def _by_mapping(descriptor: int) -> Callable[[int], bool] | None:
    """By mincore(2), on Linux only: other systems answer about this process alone. Files that belong to others are
    always said to be cached."""
    mincore = getattr(_libc(), "mincore", None)
    if mincore is None:
        return None
    length = os.fstat(descriptor).st_size
    try:
        mapping = mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY)  # ctypes asks for an address it may write to
    except (OSError, ValueError):  # it counts as memory that may be written, of which the system may allow less
        return None
    address, page = ctypes.addressof(ctypes.c_char.from_buffer(mapping)), ctypes.c_ubyte(0)

    def cached(offset: int) -> bool:
        at = min(offset, length - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        failed = mincore(ctypes.c_void_p(address + at), ctypes.c_size_t(1), ctypes.byref(page))
        return bool(failed or page.value & 1)

    cached.mapping = mapping  # type: ignore[attr-defined]  # kept for as long as its address is
    return cached


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
