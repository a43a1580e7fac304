"""Many small tensors to a GPU through a little locked memory.

A copy from memory that is not locked goes through the driver's own buffer, one tensor after the other, and the caller
waits for each: 5 to 7 GB/s on an H200 with PCIe 5. Here some threads fill one locked buffer while the GPU takes what
is in another, and the caller says what becomes of what arrived before.

Who loads a model says so (`uploading`), and whatever is sent to its device meanwhile in the same thread takes that way.
It is there when `uploading` ends.

[Note: In turn]
A buffer that is full goes to the threads. What was in the one before it has been copied by then, or nearly: it goes to
the device in one transfer, and is put where it belongs by the device itself. The third is the one to be filled next.
Copies are made by threads of our own: torch's wait for each other, and so for whatever else has a core (a compiler).
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from .sizes import aligned

PLAIN = (torch.Tensor, torch.nn.Parameter)  # a tensor of another class may be more than its bytes
BUFFER_BYTES = 16 << 20  # as long as its transfer takes, 0.3 ms, nobody notices
BUFFERS = 3
THREADS = 4

log = logging.getLogger("sluice.lora")

_active = threading.local()

Use = Callable[[torch.Tensor], object]
Move = tuple[int, int, int]  # addresses to and from, bytes


@dataclass
class _Buffer:
    """Locked memory and what is on its way through it."""

    memory: torch.Tensor
    taken: torch.cuda.Event | None  # when the GPU has what was in it
    filled: int = 0
    moves: list[Move] = field(default_factory=list)
    uses: list[tuple[int, torch.Tensor, Use]] = field(default_factory=list)
    copies: list[Future[None]] = field(default_factory=list)


class Uploads:
    """Copies to one device, on its current stream.

    Args:
        device: as its tensors name it; a CPU will do, to test this.
        buffer_bytes: of each buffer; a multiple of what tensors are aligned to.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.device = device
        self._bytes = buffer_bytes
        self._buffers: list[_Buffer] | None = None  # from the first copy on; none where nothing can be locked
        self._now = 0  # the buffer that is being filled; the one before it may be with the threads

    def send(self, tensor: torch.Tensor, use: Use) -> None:
        """Have `use` called with a copy of `tensor`, which lies in host memory, on the device: in the order of these
        calls, `finish` at the latest. The copy is there for the call alone."""
        if not self._locked():
            use(tensor.to(self.device))
            return
        source = tensor.contiguous()
        if source.nbytes <= self._bytes:
            self._add(source, 0, source.nbytes, lambda arrived: use(arrived.view(source.dtype).view(source.shape)))
            return
        whole = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        flat = whole.view(-1).view(torch.uint8)
        for first in range(0, source.nbytes, self._bytes):
            stop = min(first + self._bytes, source.nbytes)
            self._add(source, first, stop, flat[first:stop].copy_)
        self._add(source, 0, 0, lambda _: use(whole))

    def finish(self) -> None:
        """All that was sent is, or will be, where it belongs when the device comes to what is started next."""
        if self._buffers:
            try:
                try:
                    self._turn()
                finally:  # where a use of the one buffer fails, the other's are still owed
                    self._turn()
            finally:
                self._pool.shutdown()
                self._buffers = None

    def _add(self, source: torch.Tensor, start: int, stop: int, use: Use) -> None:
        """Bytes of `source`, which is kept alive by `use` or by what this remembers."""
        assert self._buffers is not None
        if self._buffers[self._now].filled + stop - start > self._bytes:
            self._turn()
        buffer = self._buffers[self._now]
        if start < stop:
            to = buffer.memory.data_ptr() + buffer.filled
            buffer.moves.append((to, source.data_ptr() + start, stop - start))
        buffer.uses.append((stop - start, source, use))
        buffer.filled += aligned(stop - start)

    def _turn(self) -> None:
        """The next buffer is the one to be filled."""
        assert self._buffers is not None
        full, before = self._buffers[self._now], self._buffers[self._now - 1]
        full.copies = [self._pool.submit(_copy, moves) for moves in _shared(full.moves, THREADS)]
        self._start(before)
        self._now = (self._now + 1) % BUFFERS
        if (taken := self._buffers[self._now].taken) is not None:
            taken.synchronize()

    def _start(self, buffer: _Buffer) -> None:
        """Its way on the device, once the threads have filled it."""
        for copy in buffer.copies:
            copy.result()
        uses, filled = buffer.uses, buffer.filled
        buffer.moves, buffer.uses, buffer.copies, buffer.filled = [], [], [], 0
        with torch.inference_mode():  # some were sent from within that, which may be over
            if filled:
                self._arrived[:filled].copy_(buffer.memory[:filled], non_blocking=True)
            if buffer.taken is not None:
                buffer.taken.record(torch.cuda.current_stream(self.device))
            at = 0
            for nbytes, _, use in uses:
                use(self._arrived[at : at + nbytes])
                at += aligned(nbytes)

    def _locked(self) -> bool:
        if self._buffers is None:
            lock = self.device.type == "cuda"
            empty = partial(torch.empty, self._bytes, dtype=torch.uint8)
            try:
                self._arrived = empty(device=self.device)
                memory = [empty(pin_memory=lock) for _ in range(BUFFERS)]
            except RuntimeError as error:  # the device's memory is full, too
                log.debug("LoRAs go to the GPU through pageable memory: %s", error)
                memory = []
            self._buffers = [_Buffer(found, torch.cuda.Event() if lock else None) for found in memory]
            self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "sluice-upload")
        return bool(self._buffers)


def _shared(moves: list[Move], shares: int) -> list[list[Move]]:
    """The moves by about as many bytes in each share."""
    each = sum(nbytes for *_, nbytes in moves) / shares
    found: list[list[Move]] = [[]]
    done = 0
    for move in moves:
        if done >= each * len(found):
            found.append([])
        found[-1].append(move)
        done += move[2]
    return found


def _copy(moves: list[Move]) -> None:
    for move in moves:
        ctypes.memmove(*move)  # which lets other threads have Python


@contextmanager
def uploading(device: torch.device, may_lock: bool) -> Iterator[None]:
    """Within it, what this thread sends to `device` goes through locked memory where the device has such, and is there
    when it ends, not before."""
    before = getattr(_active, "uploads", None)
    locks = may_lock and device.type == "cuda"
    uploads = Uploads(torch.empty(0, device=device).device) if locks else None
    _active.uploads = uploads
    try:
        yield
    finally:
        _active.uploads = before
        if uploads is not None:
            uploads.finish()  # after an error, too: what was sent counts as moved


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, with its numbers in it when `uploading` ends; itself if it is there."""
    uploads = _way(tensor, device)
    if uploads is None:
        return tensor.to(device)
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    uploads.send(tensor, there.copy_)
    return there


def upload(tensor: torch.Tensor, device: torch.device, use: Use) -> None:
    """Have `use` called with `tensor` on `device`: now, or when it is there and `uploading` ends."""
    uploads = _way(tensor, device)
    if uploads is None:
        use(tensor.to(device))
    else:
        uploads.send(tensor, use)


def _way(tensor: torch.Tensor, device: torch.device) -> Uploads | None:
    uploads: Uploads | None = getattr(_active, "uploads", None)
    if uploads is None or uploads.device != device or tensor.device.type != "cpu":
        return None
    return uploads if type(tensor) in PLAIN and not tensor.requires_grad else None
