"""Bring weights to the device to stay there: one pass over the link where their file's pages can be registered.

The pages are registered only for as long as the copy takes, so this needs no memory and leaves nothing behind. Where
registering is refused the bytes go the slow way, through the driver's own buffer. What of the file is not cached is
read before, so that whoever watches can see how far that is, and end it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import psutil
import torch

from ..loaders.read_ahead import Watch, read_ahead, unwatched
from .device import Device
from .errors import RefusedError, SourceError
from .files import OpenFiles, Weight
from .host_memory import HostSource, Request
from .page_cache import page_cache
from .slots import Located, Slot

log = logging.getLogger("sluice.offload")

WORTH_REGISTERING = 64 << 20  # bytes: below that, locking pages takes longer than it saves
TOLD_BYTES = 256 << 20  # copied between two looks at whether to go on
SHARE_OF_FREE_RAM = 0.5  # what is more than that is not read ahead, for its first part might be dropped by then


def bring(
    slots: Sequence[Slot],
    device: Device,
    dtype_of: Callable[[Slot], torch.dtype | None],
    located: Located,
    may_pin: bool,
    watch: Watch = unwatched,
) -> list[torch.nn.Parameter]:
    """The weights of `slots` as parameters on `device`, complete when this returns; where they are now is not changed.

    Args:
        dtype_of: what a plain weight becomes on the way; None leaves it as it is.
        watch: told of the bytes; what it raises leaves nothing on the device.

    Raises:
        torch.OutOfMemoryError: nothing of them stays on the device.
        SourceError: a file is not what was loaded.
    """
    weights = [slot.weight(located) for slot in slots]
    in_files = {
        (0, k): weight
        for k, (slot, weight) in enumerate(zip(slots, weights, strict=True))
        if weight.file is not None and weight.nbytes and dtype_of(slot) in (None, slot.home.dtype)
    }
    there: dict[int, torch.Tensor] = {}
    if device.torch_device.type == "cuda" and sum(weight.nbytes for weight in in_files.values()) >= WORTH_REGISTERING:
        free = psutil.virtual_memory().available
        try:
            source = page_cache(Request(in_files, device, 0, free, may_pin, watch=watch))
        except RefusedError as refusal:
            log.debug("weights go to the GPU through pageable memory: %s", refusal)
        else:
            there = _copied(source, device, {k: weight.nbytes for (_, k), weight in in_files.items()}, watch)
    left = [k for k in range(len(slots)) if k not in there]
    _read_ahead([weights[k] for k in left], watch)
    arrived = {k: slots[k].over(place) for k, place in there.items()}
    with watch("copying weights", sum(weights[k].nbytes for k in left)) as told:
        for k in left:
            arrived[k] = slots[k].moved(device.torch_device, dtype_of(slots[k]))
            told(weights[k].nbytes)
    return [arrived[k] for k in range(len(slots))]


def _copied(source: HostSource, device: Device, sizes: dict[int, int], watch: Watch) -> dict[int, torch.Tensor]:
    """The bytes of the source's tensors on the device; the source is closed."""
    copying, allocated = device.new_copy_stream(), device.new_event()
    try:
        places = {k: device.allocate(nbytes) for k, nbytes in sizes.items()}
        # The allocator may hand out memory that kernels enqueued earlier still use.
        device.record(allocated, device.compute_stream())
        device.wait(copying, allocated)
        with watch("copying weights", sum(sizes.values())) as told:
            copied = 0
            for k, place in places.items():
                with device.on(copying):
                    source.copier(0, k, place, copying)()
                copied += place.nbytes
                if copied >= TOLD_BYTES:
                    device.synchronize(copying)
                    told(copied)
                    copied = 0
        device.synchronize(copying)
        source.check()
    finally:
        device.synchronize(copying)
        source.close()
    return places


def _read_ahead(weights: Iterable[Weight], watch: Watch) -> None:
    """Those that lie in files, which the mapping of a file would have the system read page by page."""
    in_files = [weight for weight in weights if weight.file is not None]
    if sum(weight.nbytes for weight in in_files) > SHARE_OF_FREE_RAM * psutil.virtual_memory().available:
        return
    try:
        files = OpenFiles(in_files)
    except SourceError as error:  # a file that was moved can still be read where it is mapped
        log.debug("nothing is read ahead: %s", error)
        return
    try:
        for file in files.all():
            spans = [(one.offset, one.offset + one.nbytes) for one in in_files if one.file == file.stored]
            read_ahead(file.fileno(), spans, watch, file.stored.path.name)
    finally:
        files.close()
