"""Many small tensors to a GPU through a little locked memory.

A copy from memory that is not locked goes through the driver's own buffer, one tensor after the other, and the caller
waits for each: 5 to 7 GB/s on an H200 with PCIe 5. Here the caller fills one half of a locked buffer while the GPU
takes what is in the other, and waits for nothing but a half that is still being read: 13 to 18 GB/s.

Who loads a model says so (`uploading`), and whatever is sent to its device meanwhile in the same thread takes that way.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .sizes import aligned

PLAIN = (torch.Tensor, torch.nn.Parameter)  # a tensor of another class may be more than its bytes
HALF_BYTES = 16 << 20  # as long as its copy takes, 0.3 ms, nobody notices

log = logging.getLogger("sluice.lora")

_active = threading.local()


class Uploads:
    """Two halves of locked memory, used in turn, for copies to one CUDA device on its current stream.

    Args:
        device: as its tensors name it.
        half_bytes: of each half; a multiple of what tensors are aligned to.
    """

    def __init__(self, device: torch.device, half_bytes: int = HALF_BYTES) -> None:
        self.device = device
        self._half_bytes = half_bytes
        self._halves: list[torch.Tensor] | None = None  # from the first copy on; none where nothing can be locked
        self._taken = [torch.cuda.Event() for _ in range(2)]  # when the GPU has what was in it
        self._now, self._filled = 0, 0

    def fill(self, there: torch.Tensor, tensor: torch.Tensor) -> None:
        """Copy `tensor`, which lies in host memory, into `there`: contiguous, on the device, of its shape and dtype."""
        if not self._locked():
            there.copy_(tensor)
            return
        source, to = tensor.contiguous(), there.view(-1).view(torch.uint8)
        for first in range(0, source.nbytes, self._half_bytes):
            nbytes = min(source.nbytes - first, self._half_bytes)
            room = self._room(nbytes)
            # By one thread: torch's many wait for each other, and for whatever else has a core (a compiler, say).
            ctypes.memmove(room.data_ptr(), source.data_ptr() + first, nbytes)
            to[first : first + nbytes].copy_(room, non_blocking=True)

    def _room(self, nbytes: int) -> torch.Tensor:
        """Locked memory that nothing reads."""
        assert self._halves is not None
        if self._filled + nbytes > self._half_bytes:
            self._taken[self._now].record(torch.cuda.current_stream(self.device))
            self._now, self._filled = 1 - self._now, 0
            self._taken[self._now].synchronize()
        room = self._halves[self._now][self._filled : self._filled + nbytes]
        self._filled += aligned(nbytes)
        return room

    def _locked(self) -> bool:
        if self._halves is None:
            try:
                self._halves = [torch.empty(self._half_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            except RuntimeError as error:
                log.debug("LoRAs go to the GPU through pageable memory: %s", error)
                self._halves = []
        return bool(self._halves)


@contextmanager
def uploading(device: torch.device, may_lock: bool) -> Iterator[None]:
    """Within it, what this thread sends to `device` goes through locked memory where the device has such."""
    before = getattr(_active, "uploads", None)
    locks = may_lock and device.type == "cuda"
    _active.uploads = Uploads(torch.empty(0, device=device).device) if locks else None
    try:
        yield
    finally:
        _active.uploads = before


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; itself if it is there."""
    uploads = _way(tensor, device)
    if uploads is None:
        return tensor.to(device)
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    uploads.fill(there, tensor)
    return there


def upload_into(there: torch.Tensor, tensor: torch.Tensor) -> None:
    """`there.copy_(tensor)`; a cast is made where `there` is."""
    uploads = _way(tensor, there.device)
    if uploads is None:
        there.copy_(tensor)
    elif there.dtype == tensor.dtype and there.is_contiguous():
        uploads.fill(there, tensor)
    else:
        there.copy_(uploaded(tensor, there.device))


def _way(tensor: torch.Tensor, device: torch.device) -> Uploads | None:
    uploads: Uploads | None = getattr(_active, "uploads", None)
    if uploads is None or uploads.device != device or tensor.device.type != "cpu":
        return None
    return uploads if type(tensor) in PLAIN and not tensor.requires_grad else None
