"""Bring weights to the device to stay there: one pass over the link where their file's pages can be locked.

Pages are locked a stretch at a time (`stretches`), so this needs no memory and leaves nothing behind but what is to
stay locked for the next time (`kept`). Where that is refused the bytes go the slow way, through the driver's own
buffer. What of the file is not cached is read before, so that whoever watches can see how far that is, and end it.

What is locked already is only enqueued: `send` returns at once, and all that a loader has to do in Python, which for a
text encoder takes half as long as its copies, is done while they run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set

import psutil
import torch

from ..loaders.read_ahead import Watch, read_ahead, unwatched
from .device import Device
from .errors import SourceError
from .files import OpenFiles, Weight
from .kept import KeptPages
from .pack import EACH_BYTES, Pack, can_pack
from .slots import Located, Slot
from .stretches import Crossing, copied, under_way

log = logging.getLogger("sluice.offload")

WORTH_LOCKING = 64 << 20  # bytes: below that, locking pages takes longer than it saves
SHARE_OF_FREE_RAM = 0.5  # what is more than that is not read ahead, for its first part might be dropped by then

DtypeOf = Callable[[Slot], "torch.dtype | None"]


class OnTheWay:
    """Weights as parameters on a device. What the thread that sent them enqueues comes after their copies, which may
    still run; until `wait`, nothing of them may be let go of."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], crossings: Sequence[Crossing | Pack] = (), watch: Watch = unwatched
    ) -> None:
        self.parameters = parameters
        self._crossings, self._watch = list(crossings), watch

    def wait(self) -> list[torch.nn.Parameter]:
        """The parameters, complete.

        Raises:
            SourceError: a file was changed meanwhile: they are not what was loaded.
        """
        if self._crossings:
            nbytes = sum(crossing.nbytes for crossing in self._crossings)
            try:
                with self._watch("copying weights", nbytes) as told:
                    for crossing in self._crossings:
                        crossing.finish()
                    told(nbytes)
            finally:
                self.close()
        return self.parameters

    def close(self) -> None:
        """Wait, whatever has arrived."""
        while self._crossings:
            self._crossings.pop().close()


def send(
    slots: Sequence[Slot],
    device: Device,
    dtype_of: DtypeOf,
    located: Located,
    may_pin: bool,
    watch: Watch = unwatched,
    kept: KeptPages | None = None,
) -> OnTheWay:
    """The weights of `slots` on their way to `device`, or there already; where they are now is not changed.

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
    unlocked = {k for k, one in enumerate(weights) if one.file is not None and not (kept and kept.holds(one))}
    _read_ahead([weights[k] for k in sorted(unlocked)], watch)
    refusal = _refusal(as_stored, unlocked, device, may_pin)
    others = [k for k in range(len(slots)) if k not in as_stored]
    packed = [k for k in others if weights[k].nbytes <= EACH_BYTES] if refusal is None else []
    packed = packed if can_pack(device, [weights[k].nbytes for k in packed]) else []
    arrived: dict[int, torch.nn.Parameter] = {}
    crossings: list[Crossing | Pack] = []
    if refusal is None and kept is not None and unlocked.isdisjoint(as_stored):
        # First, for behind the others these copies would wait for all of them (measured on an H200).
        alone = set(others).difference(packed)
        arrived = {k: slots[k].moved(device.torch_device, dtype_of(slots[k]), at_once=True) for k in alone}
        if (crossing := under_way(as_stored, device, kept)) is not None:
            crossings.append(crossing)
            try:
                arrived.update((k, slots[k].over(place)) for k, place in crossing.arrived().items())
                if packed:
                    crossings.append(pack := Pack([slots[k].as_moved(dtype_of(slots[k])) for k in packed], device))
                    arrived.update((k, slots[k].over_moved(t)) for k, t in zip(packed, pack.arrived, strict=True))
            except BaseException:
                OnTheWay([], crossings).close()
                raise
            return OnTheWay([arrived[k] for k in range(len(slots))], crossings, watch)
    with watch("copying weights", sum(weight.nbytes for weight in weights)) as told:
        there: dict[int, torch.Tensor] = {}
        if refusal is None and as_stored:
            there, refusal = copied(as_stored, device, told, kept)
        if refusal:
            log.debug("weights go to the GPU through pageable memory: %s", refusal)
        for k, slot in enumerate(slots):
            if k in there:
                arrived[k] = slot.over(there[k])
            else:
                if k not in arrived:
                    arrived[k] = slot.moved(device.torch_device, dtype_of(slot))
                told(weights[k].nbytes)
    return OnTheWay([arrived[k] for k in range(len(slots))])


def _refusal(weights: Mapping[int, Weight], unlocked: Set[int], device: Device, may_pin: bool) -> str | None:
    """Why these do not come through locked pages, empty where they are too few to lock them; None: they do."""
    if not weights.keys().isdisjoint(unlocked) and sum(one.nbytes for one in weights.values()) < WORTH_LOCKING:
        return ""
    return device.registrar.read_only_refusal() if may_pin else "pinned memory is switched off"


def _read_ahead(in_files: Sequence[Weight], watch: Watch) -> None:
    """Which the mapping of a file would have the system read page by page."""
    if not in_files:
        return
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
