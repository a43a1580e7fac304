"""When up to eight rows are multiplied by a quantised weight in tiles, and how the work is cut up: tiles.py's host.

The cuts are measured on an H200: benchmarks/results/skinny_tiles_h200.txt has them all, and what binds.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

from ...gguf.types import BLOCKS, GGMLType
from . import integers, staging


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, at no cost
class Cut:
    """Attributes:
    tiles: sixteens of rows of the weight for a program, 1 or 2.
    segment: blocks of a row that a warp copies at once.
    stages: segments that a warp has room for, the one it multiplies included: 2 or 3.
    warps: of a program, which take the segments of its rows in turn.
    above: rows of x above which it is faster than the other programs.
    """

    tiles: int
    segment: int
    stages: int
    warps: int
    above: int


@dataclass(frozen=True, eq=False)
class Tiling:
    """How a type is given to tiles.py.

    Attributes:
        head, unit: its decoder, see integers.py; place: which elements the units are.
        width: elements that lie side by side in a lane's share, 4 or 8.
        zero: what the decoded integers are too large by.
        large, small: for weights of many rows, and of few.
    """

    head: Any
    unit: Any
    place: integers.Place
    width: int
    zero: int
    large: Cut
    small: Cut


TILINGS: dict[GGMLType, Tiling] = {
    GGMLType.Q4_0: Tiling(
        integers.d_head, integers.q4_0, integers.NIBBLES_OF_32, 4, 8, Cut(2, 8, 2, 2, above=2), Cut(2, 8, 2, 4, above=4)
    ),
    GGMLType.Q8_0: Tiling(
        integers.d_head, integers.q8_0, integers.BYTES_OF_32, 4, 128, Cut(1, 8, 2, 4, above=2), Cut(1, 4, 2, 4, above=4)
    ),
    GGMLType.Q4_K: Tiling(
        integers.q4_k_head,
        integers.q4_k,
        integers.NIBBLES_OF_64,
        8,
        0,
        Cut(2, 1, 2, 2, above=0),
        Cut(1, 1, 2, 4, above=4),
    ),
    GGMLType.Q6_K: Tiling(
        integers.q6_k_head,
        integers.q6_k,
        integers.QUARTERS_OF_128,
        4,
        32,
        Cut(1, 1, 2, 4, above=4),
        Cut(1, 1, 2, 4, above=4),
    ),
}


# The types for which tiles are taken without being asked for. None yet: two forms of the program were run on a GPU, and
# the present one, which is made of both, was not. A wrong result is noticed (`multiply._look_at`), an access beyond the
# weight could not be recovered from.
USED: frozenset[GGMLType] = frozenset()


def pitch(nbytes: int, align: int, width: int) -> int:
    """Bytes from a row of a segment of `nbytes` to the next in shared memory, so that no two of the rows that a load
    touches at once begin in the same bank; `align`: what is known of the rows' addresses."""
    chunks = -(-(nbytes + 16 - align) // 16)
    return 16 * (chunks + (1 - chunks % 2 if width == 4 else (2 - chunks) % 4))


def arguments(tiling: Tiling, cut: Cut, ggml_type: GGMLType, columns: int, source: int, interpreted: bool) -> tuple:
    """The arguments of `tiles` from HEAD on, for rows of `columns` elements; `source` is a power of two that divides
    the address of the first."""
    layout = BLOCKS[ggml_type]
    blocks, segment = columns // layout.elements, cut.segment * layout.nbytes
    align = gcd(16, source, blocks * layout.nbytes, segment)
    between = pitch(segment, align, tiling.width)
    declared = staging.declaration(cut.tiles * 16 * between * cut.stages * cut.warps)
    decoder = tiling.head, tiling.unit, *tiling.place, tiling.width, tiling.zero
    lies = layout.nbytes, layout.elements, align, blocks
    return (*decoder, *lies, cut.tiles, cut.segment, cut.stages, cut.warps, between, declared, interpreted)
