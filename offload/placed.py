"""The weights of a network that lie on its device, by our own doing, and those on their way there.

What is on its way is shown to the network at once: whatever computes with it comes after its copies (`arrival`). Only
who lets go of the memory has to wait for them, and that is done here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .arrival import DtypeOf, OnTheWay, send
from .device import Device
from .pack import Pack
from .slots import Slot, memory_of
from .terms import Terms


class Placed(dict[Slot, torch.nn.Parameter]):
    """What is there instead of each slot's home."""

    def __init__(self) -> None:
        super().__init__()
        self._on_the_way: list[OnTheWay] = []

    def also(self, pack: Pack | None) -> None:
        """Wait for this with the rest."""
        if pack is not None:
            self._on_the_way.append(OnTheWay([], [pack]))

    def send(self, slots: Sequence[Slot], device: Device, dtype_of: DtypeOf, terms: Terms) -> None:
        """Show the network copies of `slots` on `device`; `wait` before anybody else is told that they are there.

        Raises:
            torch.OutOfMemoryError, SourceError: nothing of them is there.
        """
        if terms.kept is None:  # else a block's weights share memory, because they leave together
            slots = sorted(slots, key=lambda slot: -slot.nbytes)
        way = send(slots, device, dtype_of, terms.located, terms.may_pin, terms.watch, terms.kept)
        self._on_the_way.append(way)
        for slot, parameter in zip(slots, way.parameters, strict=True):
            self[slot] = parameter
            slot.show(parameter)

    def stop(self) -> None:
        """Nothing is on its way any more."""
        while self._on_the_way:
            self._on_the_way.pop().close()

    def wait(self) -> None:
        """Until all that was sent has arrived.

        Raises:
            SourceError: it is not what was loaded; nothing is there then.
        """
        try:
            for way in self._on_the_way:
                way.wait()
            self._on_the_way = []
        except BaseException:
            self.go_home(list(self))  # else the next run would take it for complete
            raise

    def adopt(self, slots: Iterable[Slot]) -> None:
        """What others have put in the place of some of `slots` is what lies there now."""
        for slot in slots:
            shown = slot.shown
            if shown is not None and shown is not slot.home and shown is not self.get(slot):
                self[slot] = shown

    def disown(self) -> None:
        """Others have taken away what they put there."""
        self.go_home([slot for slot, there in self.items() if slot.shown is not there])

    def go_home(self, slots: Iterable[Slot]) -> None:
        """The homes of `slots` are shown again, and of those that share memory with them (`pieces`), which would not be
        free otherwise."""
        slots = list(slots)
        if not slots:
            return
        self.stop()
        for slot in self._with_neighbours(slots):
            del self[slot]
            slot.go_home()
            slot.forget()

    def _with_neighbours(self, slots: list[Slot]) -> list[Slot]:
        if not slots or len(slots) == len(self):
            return slots
        pieces = {memory_of(self[slot]) for slot in slots}
        return [slot for slot, there in self.items() if memory_of(there) in pieces]
