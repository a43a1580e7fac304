"""Where each streamed tensor lies in the ring: addresses that never change, from step to step.

The stream of one step, all streamed tensors in the order of their blocks, is cut into *laps* between tensors. Every
lap starts at the ring's first byte and the ring is as long as the longest lap, so with n laps it holds 1/n of the
stream and each tensor has one address for good: views are made once, and a captured graph would stay valid.

    stream   | a0 a1 b0 b1 | c0 c1 d0 d1 | e0 e1 f0 f1 |      three laps of two blocks: the ring holds two blocks
    ring     0 ----------> 0 ----------> 0 ----------> then again a0

A tensor may be copied when the *latest* tensor that lay on any of its bytes is no longer needed, which is when that
tensor's block has computed. Blocks run in order, so the copy waits for this one block only, its `after`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..loaders.sizes import ALIGN, aligned


@dataclass(frozen=True)
class Copy:
    """One tensor's way into the ring: `nbytes` to `offset`, once block `after` has computed.

    That is in the same step if `after` < `block`, and in the step before if not. In the first step nothing of a step
    before has to be waited for. Within a step no copy may be made before the copies ahead of it.
    """

    block: int
    tensor: int
    nbytes: int
    offset: int
    after: int


@dataclass(frozen=True)
class Ring:
    """The arena's size and every copy of a step, in the order in which they are made."""

    nbytes: int
    copies: tuple[Copy, ...]


NO_RING = Ring(0, ())


class Stream:
    """The tensors that one step streams, and the rings that can carry them."""

    def __init__(self, chunks: Sequence[Sequence[tuple[int, int]]], depth: int) -> None:
        """`chunks`: for each block its streamed tensors as (index, bytes); a ring must hold `depth` + 1 chunks."""
        self.pieces = [(block, tensor, nbytes) for block, chunk in enumerate(chunks) for tensor, nbytes in chunk]
        sizes = [aligned(nbytes) for _, _, nbytes in self.pieces]
        self.ends = list(accumulate(sizes, initial=0))  # ends[i]: bytes before piece i
        self.nbytes = self.ends[-1]

        sums = [sum(aligned(nbytes) for _, nbytes in chunk) for chunk in chunks if chunk]
        self.together = min(depth + 1, len(sums))  # blocks whose chunks lie in the ring at the same time
        twice = list(accumulate(sums * 2, initial=0))
        self.window = max((twice[i + self.together] - twice[i] for i in range(len(sums))), default=0)
        self.most_laps = -(-self.nbytes // max(self.window, 1))  # of different lengths, so rounded up
        turn = {block: number for number, block in enumerate(dict.fromkeys(block for block, _, _ in self.pieces))}
        self.turns = [turn[block] for block, _, _ in self.pieces]
        self.blocks, self.chunks = len(chunks), len(sums)

    def largest_ring(self, room: int) -> Ring | None:
        """The longest ring within `room` bytes: whatever VRAM is left serves to copy further ahead."""
        if room < self.window:
            return None
        if not self.pieces:
            return NO_RING
        rings = (self._ring(laps) for laps in range(-(-self.nbytes // room), self.most_laps + 1))
        return next((ring for ring in rings if ring and ring.nbytes <= room), None)

    def smallest_ring(self) -> Ring:
        """The shortest ring. One lap, where no tensor shares its place with another, always works."""
        if not self.pieces:
            return NO_RING
        rings = (self._ring(laps) for laps in range(self.most_laps, 0, -1))
        return next(ring for ring in rings if ring)

    def _ring(self, laps: int) -> Ring | None:
        """The ring for this many laps, as even as tensors allow, unless it lacks depth."""
        short, long = max(self.window, -(-self.nbytes // laps)) - 1, self.nbytes  # none is shorter than a window
        while long - short > max(ALIGN, long >> 10):
            middle = (short + long) // 2
            if self._cuts(middle, laps):
                long = middle
            else:
                short = middle
        cuts = self._cuts(long, laps)
        return self._laid_out(cuts) if cuts else None

    def _cuts(self, length: int, laps: int) -> list[int] | None:
        """The first piece of each lap, and the end of the last, if `laps` of this length suffice."""
        cuts = [0]
        while cuts[-1] < len(self.pieces):
            following = bisect_right(self.ends, self.ends[cuts[-1]] + length) - 1
            if following == cuts[-1] or len(cuts) > laps:
                return None
            cuts.append(following)
        return cuts

    def _laid_out(self, cuts: list[int]) -> Ring | None:
        laps = list(pairwise(cuts))
        offsets = [self.ends[i] - self.ends[first] for first, end in laps for i in range(first, end)]
        frees = []  # for each piece the block that frees its place, less the number of blocks if a step before
        for number, (first, end) in enumerate(laps):
            earlier = laps[:number][::-1] + laps[number:][::-1]  # from the lap before back to this one, a step ago
            for i in range(first, end):
                before = self._last_over(offsets, i, earlier)
                steps = int(before >= i)
                if self.turns[i] - self.turns[before] + steps * self.chunks < self.together:
                    return None
                frees.append(self.pieces[before][0] - steps * self.blocks)
        # Copies are made in order, so none is made before those ahead of it may be.
        frees = list(accumulate(frees, max, initial=max(frees) - self.blocks))[1:]
        copies = (
            Copy(*piece, offset, free % self.blocks)
            for piece, offset, free in zip(self.pieces, offsets, frees, strict=True)
        )
        return Ring(max(self.ends[end] - self.ends[first] for first, end in laps), tuple(copies))

    def _last_over(self, offsets: list[int], piece: int, laps: list[tuple[int, int]]) -> int:
        """The last piece that lay on a byte of this one's place: in the nearest lap that reaches it."""
        start, size = offsets[piece], self.ends[piece + 1] - self.ends[piece]
        for first, end in laps:
            last = bisect_left(offsets, start + size, first, end) - 1
            if offsets[last] + self.ends[last + 1] - self.ends[last] > start:
                return last
        return piece
