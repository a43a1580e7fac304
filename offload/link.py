"""How fast bytes get to a device: measured once a process, because it is the machine's, not the model's."""

from __future__ import annotations

import contextlib
import time

import torch

from .costs import Link
from .device import Device
from .errors import RefusedError
from .host_memory import HostBuffer

PROBE_BYTES = 64 << 20
REPEATS = 3
# Sources that are slower than the link, in bytes per second: a warm file read by threads, pageable memory.
SLOWER = {"disk": 3e9, "memory": 8e9}

_measured: dict[torch.device, Link] = {}


def link_of(device: Device, kind: str | None) -> Link:
    """The link to `device` from a weight source of `kind`; None if none is chosen yet."""
    place = device.torch_device
    if place not in _measured:
        _measured[place] = Link(_rate(device))
    link = _measured[place]
    limit = SLOWER.get(kind or "", link.bytes_per_second)
    return link if limit >= link.bytes_per_second else Link(limit, link.latency)


def _rate(device: Device) -> float:
    """Bytes per second from pinned memory; the best of a few, because the first wakes the link up."""
    buffer, out = HostBuffer(PROBE_BYTES), device.allocate(PROBE_BYTES)
    buffer.data.zero_()
    with contextlib.suppress(RefusedError):  # no memory may be pinned: then this is the rate
        buffer.pin(device.registrar)
    stream, allocated, best = device.new_copy_stream(), device.new_event(), float("inf")
    # The allocator may hand out memory that kernels enqueued earlier still use.
    device.record(allocated, device.compute_stream())
    device.wait(stream, allocated)
    copy = device.copier(out, buffer.data)
    for _ in range(REPEATS):
        began = time.perf_counter()
        with device.on(stream):
            copy()
        device.synchronize(stream)
        best = min(best, time.perf_counter() - began)
    del copy
    buffer.close()
    return PROBE_BYTES / max(best, 1e-6)
