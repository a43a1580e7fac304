"""What of a network lies outside the blocks that may stream: it stays on the device, but for tables if asked."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .device import Device
from .pack import Pack, can_pack
from .slots import Slot, slots_of

Buffer = tuple[torch.nn.Module, str, torch.Tensor]


class Outside:
    """As it is while everything is at home.

    Args:
        inside: the weights of the blocks.
        tables_stay: embeddings are left in RAM.
    """

    def __init__(self, network: torch.nn.Module, inside: Iterable[Slot], tables_stay: bool) -> None:
        theirs = {owner for slot in inside for owner in slot.owners}  # the host may have wrapped a weight anew
        others = [slot for slot in slots_of(network.modules()) if theirs.isdisjoint(slot.owners)]
        self.tables = [slot for slot in others if tables_stay and _is_table(slot)]
        self.slots = [slot for slot in others if slot not in self.tables]
        self._buffers: list[Buffer] = [
            (module, name, buffer)
            for module in network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @property
    def nbytes(self) -> int:
        """Of all that stays on the device."""
        return sum(slot.nbytes for slot in self.slots) + sum(buffer.nbytes for *_, buffer in self._buffers)

    def bring_buffers(self, device: Device, may_pin: bool) -> Pack | None:
        """Have the network's buffers on the device, or on their way there; they are no longer waited for if they are
        in what this returns, which is to be closed."""
        buffers = [buffer for *_, buffer in self._buffers]
        if may_pin and can_pack(device, [buffer.nbytes for buffer in buffers]):
            pack = Pack([(buffer, buffer.dtype) for buffer in buffers], device)
            there = pack.arrived
        else:
            pack, there = None, [buffer.to(device.torch_device) for buffer in buffers]
        for (module, name, _), buffer in zip(self._buffers, there, strict=True):
            module._buffers[name] = buffer
        return pack

    def leave_buffers(self) -> None:
        """At home."""
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer


NOTHING = Outside(torch.nn.Module(), (), False)


def _is_table(slot: Slot) -> bool:
    return all(isinstance(module, torch.nn.Embedding) for module, _ in slot.owners)
