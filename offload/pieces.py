"""Device memory for many weights in few pieces.

To get one from the driver takes 80 us and to give it back 75, and a small part of that for many times its bytes: for
the 5 GB of a text encoder 12 ms each way weight by weight, and 4.6 ms in pieces of 128 MiB, on an H200. A model that
leaves and comes back at every picture pays both each time.

A piece is free when the last of its weights is let go of. So who lets go of some should do so in the order in which
they were given.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..loaders.sizes import aligned
from .device import Device

PIECE_BYTES = 128 << 20


class Pieces:
    """Places for weights of so many bytes, by number; neighbours in `nbytes` share a piece.

    Args:
        most: bytes that several weights may share; 0 gives each its own.
    """

    def __init__(self, nbytes: Mapping[int, int], device: Device, most: int) -> None:
        self._device, self._nbytes = device, nbytes
        self._starts: dict[int, tuple[int, int]] = {}  # of each weight: its piece, and where in it
        self._sizes: list[int] = []
        self._pieces: dict[int, torch.Tensor] = {}
        for number, length in nbytes.items():
            start = aligned(self._sizes[-1]) if self._sizes else 0
            if not self._sizes or start + length > most:
                self._sizes.append(0)
                start = 0
            self._starts[number] = len(self._sizes) - 1, start
            self._sizes[-1] = start + length

    def place(self, number: int) -> torch.Tensor:
        """Uninitialised bytes for one weight; torch.OutOfMemoryError where there are none."""
        piece, start = self._starts[number]
        if piece not in self._pieces:
            self._pieces[piece] = self._device.allocate(self._sizes[piece])
        return self._pieces[piece][start : start + self._nbytes[number]]

    def clear(self) -> None:
        """Keep none of them."""
        self._pieces.clear()
