"""Small tensors to the device in one copy: gathered in locked memory, enqueued, and views of one piece there.

One by one each costs 20 us, and as a copy from memory that is not locked it waits for all that the link has to do
before: on an H200, 300 of them take 6.6 ms, and 98 ms beside 5 GiB of weights (benchmarks/results/stages_h200.txt).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..loaders.sizes import aligned
from .device import Device

EACH_BYTES = 8 << 20  # what is larger goes by itself: to gather it would take longer
ALL_BYTES = 64 << 20  # of locked memory, which torch keeps for the next time


def can_pack(device: Device, nbytes: Sequence[int]) -> bool:
    """Whether tensors of these sizes are worth it, on a device that copies by itself."""
    return device.copies_by_itself and 0 < max(nbytes, default=0) <= EACH_BYTES and sum(nbytes) <= ALL_BYTES


class Pack:
    """Tensors in host memory on their way. What the calling thread computes from now on comes after the copy.

    Args:
        tensors: each with the dtype that it is to have there.

    Raises:
        torch.OutOfMemoryError: nothing of them stays on the device.
    """

    def __init__(self, tensors: Sequence[tuple[torch.Tensor, torch.dtype]], device: Device) -> None:
        self._device = device
        spans, end = [], 0
        for tensor, dtype in tensors:
            spans.append((end, end + tensor.numel() * dtype.itemsize))
            end = aligned(spans[-1][1])
        self.nbytes = end
        place, gathered = device.allocate(end), device.staging(end)
        for (tensor, dtype), (start, stop) in zip(tensors, spans, strict=True):
            gathered[start:stop].view(dtype).view(tensor.shape).copy_(tensor)
        self._stream, event = device.new_copy_stream(), device.new_event()
        device.record(event, device.compute_stream())  # the allocator may hand out memory that is still used
        device.wait(self._stream, event)
        with device.on(self._stream):
            device.copier(place, gathered)()
        device.record(event, self._stream)
        device.wait(device.compute_stream(), event)
        self._gathered = gathered
        self.arrived = [
            place[start:stop].view(dtype).view(tensor.shape)
            for (tensor, dtype), (start, stop) in zip(tensors, spans, strict=True)
        ]

    def finish(self) -> None:
        """Wait for the copy."""
        self._device.synchronize(self._stream)

    def close(self) -> None:
        """Wait, and keep nothing."""
        self.finish()
        self.arrived = []
        del self._gathered
