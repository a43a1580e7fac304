"""Device memory for many weights in few pieces.

To get one from the driver takes 80 us and to give it back 75, and a small part of that for many times its bytes: for
the 5 GB of a text encoder 12 ms each way weight by weight, and 4.6 ms in pieces of 128 MiB, on an H200. A model that
leaves and comes back at every picture pays both each time.

A piece is free when the last of its weights is let go of. So who lets go of some should do so in the order in which
they were given.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..loaders.sizes import ALIGN, aligned
from .device import Device

PIECE_BYTES = 128 << 20
GAP_BYTES = 128 << 10  # the bias of the widest layer there is: less than a copy of its own would cost


class Pieces:
    """Places for weights of so many bytes, by number; neighbours in `nbytes` share a piece.

    Args:
        most: bytes that several weights may share; 0 gives each its own.
        offsets: where each begins in a file. Neighbours that lie side by side there do so in their piece, and one copy
            brings them: what lies between two, a bias mostly, comes along.
    """

    def __init__(
        self,
        nbytes: Mapping[int, int],
        device: Device,
        most: int,
        offsets: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self._device, self._nbytes = device, nbytes
        self._starts: dict[int, tuple[int, int]] = {}  # of each weight: its piece, and where in it
        self._sizes: list[int] = []
        self._pieces: dict[int, torch.Tensor] = {}
        self._after: dict[int, int] = {}  # of those that lie as in the file behind another: that
        before = None
        for number, length in nbytes.items():
            start, beside = aligned(self._sizes[-1]) if self._sizes else 0, False
            if before is not None and number in offsets:
                gap = offsets[number] - offsets[before] - nbytes[before]
                if beside := 0 <= gap <= GAP_BYTES and (self._sizes[-1] + gap) % ALIGN == 0:
                    start = self._sizes[-1] + gap
            if not self._sizes or start + length > most:
                self._sizes.append(0)
                start, beside = 0, False
            if beside and before is not None:
                self._after[number] = before
            self._starts[number] = len(self._sizes) - 1, start
            self._sizes[-1], before = start + length, number

    def place(self, number: int) -> torch.Tensor:
        """Uninitialised bytes for one weight; torch.OutOfMemoryError where there are none."""
        _, start = self._starts[number]
        return self.piece(number)[start : start + self._nbytes[number]]

    def piece(self, number: int) -> torch.Tensor:
        """All of the piece that a weight lies in."""
        piece, _ = self._starts[number]
        if piece not in self._pieces:
            self._pieces[piece] = self._device.allocate(self._sizes[piece])
        return self._pieces[piece]

    def start(self, number: int) -> int:
        """Where in its piece a weight begins."""
        return self._starts[number][1]

    def beside(self, number: int, before: int) -> bool:
        """Whether a weight lies behind that other as it does in the file."""
        return self._after.get(number) == before

    def clear(self) -> None:
        """Keep none of them."""
        self._pieces.clear()
