"""How types are given to matrix.py, and how its work is cut up: benchmarks/results/skinny_sweep_h200.txt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...gguf.types import GGMLType
from . import fragments

Cut = tuple[int, int]  # warps of a program, units that a quad takes at once


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, at no cost
class Fragment:
    """How a type is given to matrix instructions: see fragments.py.

    Attributes:
        places, decode: what matrix.py calls.
        units: units of a block.
        zero: what the decoded integers are too large by, at most 255.
        cuts: configurations measured on an H200, for 1, 2, up to 4 and up to 8 rows of x; None: programs.py is faster.
        few: rows of x up to which to multiply is faster than to dequantise and call cuBLAS.
    """

    places: Any
    decode: Any
    units: int
    zero: int
    cuts: tuple[Cut | None, Cut | None, Cut | None, Cut | None]
    few: int = 8

    @property
    def minus_zero(self) -> int:
        """Two bfloat16 of -zero in a signed word."""
        half = int(torch.tensor(-self.zero, dtype=torch.bfloat16).view(torch.int16))
        return (half << 16) | (half & 0xFFFF)


_nibbles, _bytes, _quarters, _sixteenths, _halves = (
    fragments.nibbles_16,
    fragments.bytes_32,
    fragments.quarters_32,
    fragments.sixteenths,
    fragments.bytes_128,
)

FRAGMENTS: dict[GGMLType, Fragment] = {
    GGMLType.Q4_0: Fragment(_nibbles, fragments.q4_0, 1, 128 + 8, ((1, 4), (4, 2), (8, 1), (4, 2))),
    GGMLType.Q4_1: Fragment(_nibbles, fragments.q4_1, 1, 128, ((1, 4), (4, 2), (8, 1), (4, 2))),
    GGMLType.Q5_0: Fragment(_nibbles, fragments.q5_0, 1, 128 + 16, (None, (4, 2), (4, 2), (4, 2)), few=4),
    GGMLType.Q5_1: Fragment(_nibbles, fragments.q5_1, 1, 128, (None, (4, 2), (4, 2), (4, 2)), few=4),
    GGMLType.Q8_0: Fragment(_bytes, fragments.q8_0, 1, 0, (None, None, (8, 1), (8, 1))),
    GGMLType.Q2_K: Fragment(_quarters, fragments.q2_k, 4, 128, (None, (4, 3), (4, 2), (4, 2))),
    GGMLType.Q3_K: Fragment(_quarters, fragments.q3_k, 4, 128 + 4, (None, (4, 3), (4, 2), (4, 3))),
    GGMLType.Q4_K: Fragment(_halves, fragments.q4_k, 2, 128, ((1, 3), (2, 1), (4, 1), (4, 2))),
    GGMLType.Q5_K: Fragment(_halves, fragments.q5_k, 2, 128, ((1, 3), (2, 1), (4, 3), (4, 2))),
    GGMLType.Q6_K: Fragment(_sixteenths, fragments.q6_k, 8, 128 + 32, ((2, 2), (4, 2), (4, 2), None)),
}
