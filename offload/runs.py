"""Weights of one block that lie side by side in their file, as what is copied in one piece.

A copy costs the host some ten microseconds whatever its size, and a network with many small layers (SDXL has 700
weights in 86 blocks) computes no longer than Python needs to enqueue it. Converters write a block's tensors one behind
the other, so most copies can be joined: what a plan calls a tensor is one `Run`. The biases and norms between two
weights are copied along and not looked at, which is less than copying them apart would cost.

A run is no longer than a plan can do with: what streams is chosen run by run, and the ring is filled run by run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..loaders.sizes import ALIGN
from .files import Weight
from .slots import Located, Slot

LONGEST = 48 << 20  # bytes: about a millisecond of a fast link, of which one copy's own cost is a hundredth
SHARE = 64  # of the weights of all blocks is the longest run in a small network
GAP_SHARE = 64  # of what it joins is the most that a gap may be


@dataclass(frozen=True)
class Run:
    """Weights and the byte at which each begins, of `nbytes` in all."""

    slots: tuple[Slot, ...]
    starts: tuple[int, ...]
    nbytes: int

    def weight(self, located: Located) -> Weight:
        """Where its bytes are, for a source."""
        first = self.slots[0].weight(located)
        if len(self.slots) == 1:
            return first
        return Weight(self.nbytes, file=first.file, offset=first.offset)

    def over(self, data: torch.Tensor) -> list[tuple[Slot, torch.nn.Parameter]]:
        """Its weights over `data` (uint8, `nbytes` long, on any device)."""
        return [
            (slot, slot.over(data[start : start + slot.nbytes]))
            for slot, start in zip(self.slots, self.starts, strict=True)
        ]


def runs_of(blocks: Sequence[Sequence[Slot]], located: Located) -> list[list[Run]]:
    """The weights of each block as runs, in the order of the file. What lies in no file is a run of its own.

    Weights are joined where each begins as well aligned behind the first as it would by itself: what is computed from
    them could depend on that.
    """
    longest = min(LONGEST, sum(slot.nbytes for slots in blocks for slot in slots) // SHARE)
    return [_of_block(slots, located, longest) for slots in blocks]


def _of_block(slots: Sequence[Slot], located: Located, longest: int) -> list[Run]:
    places = {slot: slot.location(located) for slot in slots}
    in_files = [(str(place[0].path), place[1], slot) for slot, place in places.items() if place is not None]
    runs = [Run((slot,), (0,), slot.nbytes) for slot, place in places.items() if place is None]
    last: tuple[str, int] | None = None  # the file of the last run in one, and where in it that begins
    for path, offset, slot in sorted(in_files, key=lambda found: found[:2]):
        if last is not None and last[0] == path and (joined := _joined(runs[-1], slot, offset - last[1], longest)):
            runs[-1] = joined
        else:
            runs.append(Run((slot,), (0,), slot.nbytes))
            last = path, offset
    return runs


def _joined(run: Run, slot: Slot, start: int, longest: int) -> Run | None:
    """`run` and behind it `slot`, which begins `start` bytes after it does; None if they stay apart."""
    end = start + slot.nbytes
    gap = start - run.nbytes
    if start % ALIGN or end > longest or not 0 <= gap * GAP_SHARE <= min(run.nbytes, slot.nbytes):
        return None
    return Run((*run.slots, slot), (*run.starts, start), end)
