"""Streamed bytes that lie in host memory before they are asked for: copying them is one call that does not wait.

Two rungs end here, and differ in whose memory it is. `page_cache` makes it, of the pages that the kernel keeps of the
file anyway; `pinned` below reads the file into memory of its own. Weights that are in plain memory to begin with are
copied to pinned memory where the budget allows, and are otherwise used where they are: right, but slow, because the
driver bounces them through a buffer of its own (8.6 instead of 55 GB/s) and the caller waits for that.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from ..loaders.read_ahead import Told, Watch, patiently, unwatched
from ..loaders.sizes import aligned, size
from .device import Device, Stream
from .errors import NoRoomToLockError, RefusedError
from .files import Key, OpenFiles, Weight, streamed_bytes
from .registration import Registrar

if TYPE_CHECKING:
    from .kept import KeptPages

CHUNK_BYTES = 256 << 20  # one registration, or one weight; a limit on locked memory then shows before all is read
READ_BYTES = 8 << 20  # one read


class Source(Protocol):
    """Where streamed weights come from. Used by one thread at a time."""

    kind: str
    reason: str  # what it is and what it took, for people
    pinned_bytes: int  # memory of its own that is locked; pages of the file's cache are not counted

    def ready(self, block: int, tensor: int) -> bool:
        """Whether a copy of it would be enqueued at once. Asking for a tensor starts reading it."""

    def copier(self, block: int, tensor: int, out: torch.Tensor, stream: Stream) -> Callable[[], object]:
        """What enqueues the copy of the tensor's bytes to `out`, each time it is called inside `device.on(stream)`.

        It may raise SourceError, and nothing is known of what `out` holds then. To be dropped before `close`.
        """

    def copy_of(self, block: int, tensor: int) -> torch.Tensor | None:
        """The tensor's bytes, where the source has read them into memory of its own for good."""

    def check(self) -> None:
        """SourceError if the files are no longer those that were loaded."""

    def close(self) -> None:
        """Give up memory, registrations, files and threads; idempotent. No copy may be under way any more.

        What outlives it: the weights' own tensors and files, which belong to the caller.
        """


@dataclass(frozen=True)
class Request:
    """What a source must hold, and what it may use for it."""

    weights: Mapping[Key, Weight]  # those that stream, in the order of the plan's copies
    device: Device
    ram_budget_bytes: int  # of its own, locked
    free_ram_bytes: int  # of the system, its file cache included
    may_pin: bool = True
    threads: int = 8
    watch: Watch = unwatched  # around what takes long; its exceptions end the work
    kept: KeptPages | None = None  # pages of the files that are locked already, and stay so

    @property
    def in_files(self) -> dict[Key, Weight]:
        return {key: weight for key, weight in self.weights.items() if weight.file is not None}

    @property
    def in_memory(self) -> dict[Key, torch.Tensor]:
        return {key: weight.data for key, weight in self.weights.items() if weight.data is not None}


class HostBuffer:
    """Anonymous memory of any size. `pin_memory()` would round it up to a power of two, and keep it for ever.

    RefusedError where the system has no more.
    """

    def __init__(self, nbytes: int) -> None:
        try:
            self._map = _anonymous(nbytes)
        except (OSError, MemoryError) as error:
            raise RefusedError(f"the system gives no {size(nbytes)} of RAM ({error})") from error
        self.view = memoryview(self._map)
        # On the memoryview, which keeps the mapping open for as long as any slice of the tensor lives.
        # No inference tensor, whatever mode the host is in: the threads that fill it are outside of that.
        with torch.inference_mode(False):
            self.data = torch.frombuffer(self.view, dtype=torch.uint8)
        self._pinned_by: Registrar | None = None

    def pin(self, registrar: Registrar) -> None:
        registrar.register(self.data.data_ptr(), self.data.nbytes)
        self._pinned_by = registrar

    def close(self) -> None:
        if self._pinned_by is not None:
            self._pinned_by.unregister(self.data.data_ptr())
            self._pinned_by = None
        # A slice that somebody kept would keep the memory; it goes with the slice.
        del self.data, self.view
        with contextlib.suppress(BufferError):
            self._map.close()


def _anonymous(nbytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Owner(Protocol):
    def close(self) -> None: ...


@dataclass
class HostSource:
    """Tensors as pieces in host memory, and what must be closed after them, last first."""

    kind: str
    device: Device
    files: OpenFiles
    reason: str = ""
    pinned_bytes: int = 0
    pieces: dict[Key, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)  # (where in the tensor, bytes)
    owners: list[Owner] = field(default_factory=list)

    def ready(self, block: int, tensor: int) -> bool:
        return True

    def copier(self, block: int, tensor: int, out: torch.Tensor, stream: Stream) -> Callable[[], object]:
        copies = [
            self.device.copier(out[start : start + data.nbytes], data) for start, data in self.pieces[block, tensor]
        ]
        return copies[0] if len(copies) == 1 else partial(_each, copies)

    def copy_of(self, block: int, tensor: int) -> torch.Tensor | None:
        return self.pieces[block, tensor][0][1] if self.kind == "pinned" else None

    def check(self) -> None:
        self.files.check()

    def close(self) -> None:
        self.pieces.clear()
        while self.owners:
            self.owners.pop().close()
        self.files.close()


def _each(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def hold_memory(source: HostSource, request: Request) -> str:
    """Add the weights that are in plain memory: copied to pinned memory if that is allowed, else where they are.

    Returns what to add to the source's reason.
    """
    in_memory = request.in_memory
    loose = {key: request.weights[key] for key, data in in_memory.items() if not _is_pinned(data)}
    said = ""
    if loose:
        said = f"; {size(streamed_bytes(loose))} of other weights "
        try:
            if not request.may_pin:
                raise RefusedError("pinned memory is switched off")
            hold_pinned(source, loose, request)
            said += "copied to pinned memory"
        except RefusedError as refusal:
            said += f"stay in pageable memory, which is slow: {refusal}"
    for key, data in in_memory.items():
        source.pieces.setdefault(key, [(0, data)])
    return said


def hold_pinned(source: HostSource, weights: Mapping[Key, Weight], request: Request) -> None:
    """Add `weights`, read or copied into chunks of pinned memory; all or, with RefusedError, none of them."""
    needed = sum(aligned(weight.nbytes) for weight in weights.values())
    if source.pinned_bytes + needed > request.ram_budget_bytes:
        may = size(request.ram_budget_bytes)
        raise NoRoomToLockError(f"it needs {size(needed)} of RAM, and {may} may be pinned")
    buffers: list[HostBuffer] = []
    try:
        with request.watch("copying weights to pinned memory", streamed_bytes(weights)) as told:
            pieces = _fill(source, weights, request, buffers, told)
    except BaseException:
        for buffer in buffers:
            buffer.close()
        raise
    source.pieces.update(pieces)
    source.owners.extend(buffers)
    source.pinned_bytes += needed


def _fill(
    source: HostSource, weights: Mapping[Key, Weight], request: Request, buffers: list[HostBuffer], told: Told
) -> dict[Key, list[tuple[int, torch.Tensor]]]:
    """Chunk by chunk: reading faults the pages in, by several threads, and what is there already is locked fast."""
    pieces: dict[Key, list[tuple[int, torch.Tensor]]] = {}
    with ThreadPoolExecutor(request.threads, "sluice-fill") as pool:
        for nbytes, places in _chunks(weights):
            buffer = HostBuffer(nbytes)
            buffers.append(buffer)
            jobs = [
                pool.submit(_read, source.files, weights[key], done, buffer, offset + done, size)
                for key, offset in places.items()
                for done in range(0, weights[key].nbytes, READ_BYTES)
                for size in [min(READ_BYTES, weights[key].nbytes - done)]
            ]
            try:
                for job in jobs:
                    told(patiently(job, told))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)  # nothing may be read into memory that is given up
                raise
            buffer.pin(request.device.registrar)
            for key, offset in places.items():
                pieces[key] = [(0, buffer.data[offset : offset + weights[key].nbytes])]
    return pieces


def _chunks(weights: Mapping[Key, Weight]) -> list[tuple[int, dict[Key, int]]]:
    """The bytes of each chunk, and where in it its weights begin. None is cut: a copy may stand in for its weight."""
    chunks: list[tuple[int, dict[Key, int]]] = []
    for key, weight in weights.items():
        nbytes, (end, places) = aligned(weight.nbytes), chunks.pop() if chunks else (0, {})
        if places and end + nbytes > CHUNK_BYTES:
            chunks.append((end, places))
            end, places = 0, {}
        places[key] = end
        chunks.append((end + nbytes, places))
    return chunks


def _read(files: OpenFiles, weight: Weight, start: int, buffer: HostBuffer, offset: int, nbytes: int) -> int:
    if weight.data is not None:
        buffer.data[offset : offset + nbytes].copy_(weight.data[start : start + nbytes])
    else:
        files.of(weight).read_into(buffer.view[offset : offset + nbytes], weight.offset + start)
    return nbytes


def _is_pinned(data: torch.Tensor) -> bool:
    return torch.cuda.is_available() and data.is_pinned()


def pinned(request: Request) -> HostSource:
    """A copy of all streamed weights in locked memory."""
    if not request.may_pin:
        raise RefusedError("pinned memory is switched off")
    if all(_is_pinned(data) for data in request.in_memory.values()) and not request.in_files:
        raise RefusedError("the weights are in pinned memory already")
    source = HostSource("pinned", request.device, OpenFiles(request.weights.values()))
    try:
        hold_pinned(source, request.weights, request)
    except BaseException:
        source.close()
        raise
    source.files.close()  # all is in memory: what becomes of the files matters no more
    source.reason = f"copied {size(source.pinned_bytes)} to pinned memory"
    return source


def memory(request: Request) -> HostSource:
    """The weights where they are."""
    if request.in_files:
        raise RefusedError("the weights are in a file")
    source = HostSource("memory", request.device, OpenFiles(()))
    source.pieces = {key: [(0, data)] for key, data in request.in_memory.items()}
    locked = all(_is_pinned(data) for data in request.in_memory.values())
    source.reason = f"{size(streamed_bytes(request.weights))} of {'pinned' if locked else 'pageable'} memory"
    return source
