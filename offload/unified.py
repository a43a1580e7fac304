"""Unified memory: a GPU that shares the CPU's memory reads weights where they lie, in the mapping of their file.

On such a machine a copy "to the GPU" takes the same memory a second time. What a device can do is asked of its driver,
and the first rung that works is taken:

    host_pages   the GPU follows the CPU's page tables, so the mapping's own address will do (GB10, Grace)
    registered   the mapping's pages are locked and mapped for the GPU, read-only (Jetson, Strix Halo; and every
                 discrete card, which then reads over its bus at each use: right, but slower than a copy)
    mapping      the CPU itself, by force, so that all of this can be tested anywhere

Where none works, the reason is kept, and weights are copied as ever. It is off unless a user switches it on
(`SLUICE_UNIFIED_MEMORY`, or the setting): what it saves and costs depends on the machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import psutil
import torch

from ..loaders.sizes import size
from .device_view import bytes_at
from .errors import RefusedError
from .page_cache import PAGE, REGISTER_BYTES, SHARE_OF_FREE_RAM
from .registration import MappingRegistrar, mapping_registrar

log = logging.getLogger("sluice.offload")

VARIABLE = "SLUICE_UNIFIED_MEMORY"
IN_PLACE = "_sluice_in_place"  # what a network knows of its weights that are used in place (`attach_unified`)
OFF, AUTO, FORCE = MODES = ("off", "auto", "force")
HOST_PAGES, REGISTERED, MAPPING = "host_pages", "registered", "mapping"


def _given() -> str | None:
    """What the environment says; a word that is none of the modes is told once, and means off."""
    word = os.environ.get(VARIABLE, "").strip().lower()
    if word in ("", *MODES):
        return word or None
    log.warning("%s is %r, which is none of %s: unified memory stays off", VARIABLE, word, ", ".join(MODES))
    return OFF


_from_environment, _from_settings = _given(), OFF


def mode() -> str:
    """One of `MODES`. Off: never; auto: on a device that shares the CPU's memory; force: on any that can.

    What the environment says goes before the setting.
    """
    return _from_environment or _from_settings


def set_mode(word: str) -> None:
    """The user's setting. It counts for models that are loaded from now on.

    Raises:
        ValueError: it is none of `MODES`.
    """
    global _from_settings
    if word not in MODES:
        raise ValueError(f"unified memory: {word!r} is none of {', '.join(MODES)}")
    _from_settings = word


@dataclass(frozen=True)
class Facts:
    """What a device and its driver say of themselves."""

    name: str
    is_cpu: bool = False
    integrated: bool = False  # the CPU's memory is all it has
    host_pages: bool = False  # it follows the CPU's page tables
    read_only_refusal: str | None = None  # why memory that the CPU may only read cannot be registered

    @property
    def shares_memory(self) -> bool:
        return self.integrated or self.host_pages


@cache
def facts_of(device: torch.device) -> Facts:
    """Asked once for each device."""
    if device.type != "cuda":
        refusal = f"there is no way for {device.type}"
        return Facts(str(device), is_cpu=device.type == "cpu", read_only_refusal=refusal)
    properties = torch.cuda.get_device_properties(device)
    registrar = mapping_registrar(device)
    return Facts(
        properties.name,
        integrated=bool(getattr(properties, "is_integrated", False)),
        host_pages=registrar.follows_host_pages(),
        read_only_refusal=registrar.read_only_refusal(),
    )


@dataclass(frozen=True)
class Ladder:
    """The rungs to try, best first; without any, `reason` says why."""

    rungs: tuple[str, ...]
    reason: str


def ladder(facts: Facts, mode: str) -> Ladder:
    """What may be tried on a device in a mode."""
    if mode == OFF:
        return Ladder((), "switched off")
    if facts.is_cpu:
        if mode == FORCE:
            return Ladder((MAPPING,), "forced on the CPU")
        return Ladder((), "the model computes on the CPU, which reads the mapping in any case")
    if mode == AUTO and not facts.shares_memory:
        return Ladder((), f"{facts.name} has memory of its own, in which weights are faster")
    rungs = [HOST_PAGES] if facts.host_pages else []
    if facts.read_only_refusal is None:
        rungs.append(REGISTERED)
    why = "the GPU follows the CPU's page tables" if facts.host_pages else "the GPU shares the CPU's memory"
    if not rungs:
        return Ladder((), f"{facts.name} cannot read the file's mapping: {facts.read_only_refusal}")
    return Ladder(tuple(rungs), why if facts.shares_memory else f"forced on {facts.name}, which reads it over its bus")


class Window:
    """What a device sees of tensors in host memory. It lasts until it is closed and nothing is over it any more.

    Args:
        rung: `HOST_PAGES`, `REGISTERED` or `MAPPING`.
        tensors: contiguous, in mappings that are not written to; kept until the end.

    Raises:
        RefusedError: this rung does not work here; nothing is left behind.
    """

    def __init__(self, rung: str, device: torch.device, tensors: Sequence[torch.Tensor]) -> None:
        self.rung, self.device = rung, device
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        registrar = mapping_registrar(device)
        if rung == REGISTERED:
            room = int(psutil.virtual_memory().available * SHARE_OF_FREE_RAM)
            if self.nbytes > room:
                raise RefusedError(
                    f"{size(self.nbytes)} of the file would be locked in RAM, which has room for {size(room)}"
                )
        self._spans: list[tuple[int, int, torch.Tensor]] = []  # (address on the host, its end, what the device sees)
        for begin, end in spans_of(tensors):
            inside = [tensor for tensor in tensors if begin <= tensor.data_ptr() < end]
            if rung == REGISTERED:
                locked = _Locked(registrar, begin, end, device, inside)
                there, released = locked.address, locked.undo
            else:
                there, released = begin, partial(_drop, inside)
            self._spans.append((begin, end, bytes_at(there, end - begin, device, released)))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """One of the tensors' bytes as the device sees them: flat, uint8."""
        start = tensor.data_ptr()
        begin, seen = next((begin, seen) for begin, end, seen in self._spans if begin <= start < end)
        return seen[start - begin : start - begin + tensor.nbytes]

    def close(self) -> None:
        """Let go. What still looks at a tensor through the window keeps it open."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a kernel may still be reading
        self._spans.clear()


def _drop(held: list[torch.Tensor]) -> None:
    held.clear()


def spans_of(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """The pages that the tensors lie on, as (start, end) addresses; neighbours are one span."""
    spans: list[tuple[int, int]] = []
    for tensor in sorted(tensors, key=lambda tensor: tensor.data_ptr()):
        start = tensor.data_ptr() // PAGE * PAGE
        end = -(-(tensor.data_ptr() + tensor.nbytes) // PAGE) * PAGE
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        elif tensor.nbytes:
            spans.append((start, end))
    return spans


class _Locked:
    """One span, registered in pieces that the device sees side by side."""

    def __init__(
        self,
        registrar: MappingRegistrar,
        begin: int,
        end: int,
        device: torch.device,
        held: list[torch.Tensor],
    ) -> None:
        self._registrar, self._device, self._held = registrar, device, held
        self._pieces: list[int] = []
        self.address = 0
        try:
            for start in range(begin, end, REGISTER_BYTES):
                registrar.register(start, min(REGISTER_BYTES, end - start), read_only=True)
                self._pieces.append(start)
                there = registrar.device_address(start)
                self.address = self.address or there
                if there - self.address != start - begin:
                    raise RefusedError("the driver maps neighbouring pages to addresses that are not neighbours")
        except BaseException:
            self._unregister()
            raise

    def undo(self) -> None:
        torch.cuda.synchronize(self._device)
        self._unregister()

    def _unregister(self) -> None:
        while self._pieces:
            self._registrar.unregister(self._pieces.pop())
        self._held.clear()


Probe = Callable[[Window], "str | None"]


def open_window(device: torch.device, tensors: Sequence[torch.Tensor], probe: Probe) -> tuple[Window | None, str]:
    """A window on the first rung that works, with the reason for it; or None and why there is none.

    Args:
        probe: reads through a window as the model will; what is wrong, or None.
    """
    found = ladder(facts_of(device), mode())
    refusals: list[str] = []
    for rung in found.rungs:
        try:
            window = Window(rung, device, tensors)
        except RefusedError as refusal:
            refusals.append(f"{rung}: {refusal}")
            continue
        wrong = probe(window)
        if wrong is None:
            not_taken = "".join(f"; not {refusal}" for refusal in refusals)
            return window, f"{rung}: {found.reason}{not_taken}"
        window.close()
        refusals.append(f"{rung}: {wrong}")
    return None, "; ".join(refusals) or found.reason
