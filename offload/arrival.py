"""Bring weights to the device to stay there: one pass over the link where their file's pages can be locked.

Pages are locked a stretch at a time (`stretches`), so this needs no memory and leaves nothing behind but what is to
stay locked for the next time (`kept`). Where that is refused the bytes go the slow way, through the driver's own
buffer. What of the file is not cached is read before, so that whoever watches can see how far that is, and end it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import psutil
import torch

from ..loaders.read_ahead import Told, Watch, read_ahead, unwatched
from .device import Device
from .errors import SourceError
from .files import OpenFiles, Weight
from .kept import KeptPages
from .slots import Located, Slot
from .stretches import copied

log = logging.getLogger("sluice.offload")

WORTH_LOCKING = 64 << 20  # bytes: below that, locking pages takes longer than it saves
SHARE_OF_FREE_RAM = 0.5  # what is more than that is not read ahead, for its first part might be dropped by then


def bring(
    slots: Sequence[Slot],
    device: Device,
    dtype_of: Callable[[Slot], torch.dtype | None],
    located: Located,
    may_pin: bool,
    watch: Watch = unwatched,
    kept: KeptPages | None = None,
) -> list[torch.nn.Parameter]:
    """The weights of `slots` as parameters on `device`, complete when this returns; where they are now is not changed.

    Args:
        dtype_of: what a plain weight becomes on the way; None leaves it as it is.
        watch: told of the bytes; what it raises leaves nothing on the device.
        kept: where pages are locked already, and stay so.

    Raises:
        torch.OutOfMemoryError: nothing of them stays on the device.
        SourceError: a file is not what was loaded.
    """
    weights = [slot.weight(located) for slot in slots]
    as_stored = {
        k: weight
        for k, (slot, weight) in enumerate(zip(slots, weights, strict=True))
        if weight.file is not None and weight.nbytes and dtype_of(slot) in (None, slot.home.dtype)
    }
    _read_ahead([weight for weight in weights if weight.file is not None and not _is_locked(weight, kept)], watch)
    with watch("copying weights", sum(weight.nbytes for weight in weights)) as told:
        there = _through_locked_pages(as_stored, device, may_pin, told, kept)
        arrived = []
        for k, slot in enumerate(slots):
            if k in there:
                arrived.append(slot.over(there[k]))
            else:
                arrived.append(slot.moved(device.torch_device, dtype_of(slot)))
                told(weights[k].nbytes)
    return arrived


def _through_locked_pages(
    weights: Mapping[int, Weight], device: Device, may_pin: bool, told: Told, kept: KeptPages | None
) -> dict[int, torch.Tensor]:
    """The bytes of those that could go this way."""
    refusal = device.registrar.read_only_refusal() if may_pin else "pinned memory is switched off"
    there: dict[int, torch.Tensor] = {}
    if refusal is None and sum(weight.nbytes for weight in weights.values()) >= WORTH_LOCKING:
        there, refusal = copied(weights, device, told, kept)
    if refusal:
        log.debug("weights go to the GPU through pageable memory: %s", refusal)
    return there


def _is_locked(weight: Weight, kept: KeptPages | None) -> bool:
    return kept is not None and kept.holds(weight)


def _read_ahead(in_files: Sequence[Weight], watch: Watch) -> None:
    """Which the mapping of a file would have the system read page by page."""
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
