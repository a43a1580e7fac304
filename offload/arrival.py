"""Bring weights to the device to stay there: one pass over the link where their file's pages can be registered.

The pages are registered only for as long as the copy takes, so this needs no memory and leaves nothing behind. Where
registering is refused the bytes go the slow way, through the driver's own buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import psutil
import torch

from .device import Device
from .errors import RefusedError
from .host_memory import Request
from .page_cache import page_cache
from .slots import Located, Slot

log = logging.getLogger("sluice.offload")

WORTH_REGISTERING = 64 << 20  # bytes: below that, locking pages takes longer than it saves


def bring(
    slots: Sequence[Slot],
    device: Device,
    dtype_of: Callable[[Slot], torch.dtype | None],
    located: Located,
    may_pin: bool,
) -> list[torch.nn.Parameter]:
    """The weights of `slots` as parameters on `device`, complete when this returns; where they are now is not changed.

    Args:
        dtype_of: what a plain weight becomes on the way; None leaves it as it is.

    Raises:
        torch.OutOfMemoryError: nothing of them stays on the device.
        SourceError: a file is not what was loaded.
    """
    as_they_are = {
        (0, k): slot.weight(located) for k, slot in enumerate(slots) if dtype_of(slot) in (None, slot.home.dtype)
    }
    in_files = {key: weight for key, weight in as_they_are.items() if weight.file is not None and weight.nbytes}
    there: dict[int, torch.nn.Parameter] = {}
    if device.torch_device.type == "cuda" and sum(weight.nbytes for weight in in_files.values()) >= WORTH_REGISTERING:
        free = psutil.virtual_memory().available
        try:
            source = page_cache(Request(in_files, device, 0, free, may_pin))
        except RefusedError as refusal:
            log.debug("weights go to the GPU through pageable memory: %s", refusal)
        else:
            copying, allocated = device.new_copy_stream(), device.new_event()
            try:
                places = {k: device.allocate(weight.nbytes) for (_, k), weight in in_files.items()}
                # The allocator may hand out memory that kernels enqueued earlier still use.
                device.record(allocated, device.compute_stream())
                device.wait(copying, allocated)
                with device.on(copying):
                    for k, place in places.items():
                        source.copy(0, k, place, copying)
                device.synchronize(copying)
                source.check()
            finally:
                device.synchronize(copying)
                source.close()
            there = {k: slots[k].over(place) for k, place in places.items()}
    return [there[k] if k in there else slot.moved(device.torch_device, dtype_of(slot)) for k, slot in enumerate(slots)]
