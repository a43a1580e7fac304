"""How cuda/few_rows.cu is cut up for a weight, a number of rows and a GPU. Plain arithmetic: needs no GPU or Triton.

A program holds x for its columns in registers and streams its rows of the weight through shared memory, so what there
is to choose is how many warps share a row, how many rows are on their way at once, and whether two programs share rows
that are long and few. The cuts are measured on an H200 (benchmarks/results/few_rows_h200.txt).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch

from ...gguf.types import BLOCKS, GGMLType

SLICE = 256  # columns of a warp
ROWS = 8  # of x, at most
HEAD = 512  # bytes of shared memory for barriers, and the tiles and stages that these are enough for
TILES, STAGES = 36, 14
SLOTS = 2  # tiles whose sums are kept at once, where a program has a tile's all at once
HOPPER = 200 * 1024  # a program may have more shared memory only where there are clusters
WIDE = 20  # warps at most, where that many have a whole row
LONG = 8  # tiles of a program from which on three warps copy, and no more than two tiles are on their way
TILE = 16  # rows of the weight that are multiplied at once


@dataclass(frozen=True)
class Facts:
    """Of a type. Attributes:
    words: that a lane reads at once, which is what rows must not share banks for.
    split: programs that share rows which are long and few: where the weight's bytes take longer than the products, x is
        better asked for once again.
    """

    words: int = 1
    split: int = 2


TYPES = {
    GGMLType.Q8_0: Facts(split=1),
    GGMLType.Q4_0: Facts(),
    GGMLType.Q4_K: Facts(words=2),
    GGMLType.Q6_K: Facts(),
    GGMLType.Q5_K: Facts(words=2),
    GGMLType.Q5_0: Facts(),
    GGMLType.Q4_1: Facts(),
    GGMLType.Q5_1: Facts(),
    GGMLType.Q2_K: Facts(),
    GGMLType.Q3_K: Facts(),
    GGMLType.IQ4_NL: Facts(),
    GGMLType.IQ4_XS: Facts(),
}
BY_16 = (GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q6_K)  # groups of 16 elements
BY_32 = (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.IQ4_XS)  # groups of 32 elements, with scales of few bits
HALVES = (GGMLType.Q3_K, GGMLType.Q6_K)  # superblocks that begin with half a word


@dataclass(frozen=True)
class Cut:
    """Attributes:
    warps: at most; a program has one more that sums up, and one that copies, or COPIERS of a LONG one.
    stages: tiles, or parts of their rows, that a program has room for, at most.
    split: programs that share the columns of the same rows; 0 to choose.
    """

    warps: int = 12
    stages: int = 4
    split: int = 0


@dataclass(frozen=True)
class Gpu:
    """Attributes:
    multiprocessors: how many there are.
    shared: bytes of a multiprocessor's memory that a program may have.
    """

    multiprocessors: int
    shared: int


@dataclass(frozen=True)
class Plan:
    """A product of `m` rows of x by a weight of `n` rows and `k` columns on a GPU.

    Raises:
        ValueError: there is no program for that, or it does not fit the GPU.
    """

    ggml_type: GGMLType
    n: int
    k: int
    m: int
    gpu: Gpu
    cut: Cut = Cut()

    def __post_init__(self) -> None:
        if self.ggml_type not in TYPES or self.k % SLICE or not 0 < self.m <= ROWS or not self.n or not self.k:
            raise ValueError(
                f"{self.m} rows of x times {self.n} x {self.k} of {self.ggml_type.name}: there is a program for "
                f"1 to {ROWS} rows, columns in {SLICE}s, and " + ", ".join(t.name for t in TYPES)
            )

    @property
    def slice_bytes(self) -> int:
        layout = BLOCKS[self.ggml_type]
        return SLICE // layout.elements * layout.nbytes

    @property
    def _few(self) -> bool:
        """Whether the rows are so few that it costs more to go over them again than to begin with more of x."""
        return self.n <= 64 * self.gpu.multiprocessors and TYPES[self.ggml_type].split > 1

    @property
    def _warps_at_most(self) -> int:
        wide = self.cut.warps == Cut.warps and not self.cut.split and self._few and self.gpu.shared >= HOPPER
        return WIDE if wide and self.cut.warps < self.k // SLICE <= WIDE else self.cut.warps

    @cached_property
    def split(self) -> int:
        goes = ceil(self.k / SLICE / self._warps_at_most)
        if self.cut.split or goes == 1 or not self._few or self.gpu.shared < HOPPER:
            return self.cut.split or 1
        return TYPES[self.ggml_type].split

    @cached_property
    def groups(self) -> int:
        """Programs, or clusters of them, that run at once."""
        return max(1, self.gpu.multiprocessors // self.split)

    @property
    def slices(self) -> int:
        """Of a program."""
        return ceil(self.k / SLICE / self.split)

    @cached_property
    def warps(self) -> int:
        """As few as need not go over the tiles more often, and no more than there is shared memory for."""
        tiles = ceil(self.n / self.groups / TILE)
        fitting = 1
        for goes in range(ceil(self.slices / self._warps_at_most), self.slices + 1):
            fitting = ceil(self.slices / goes)
            if self._shared(2, min(tiles, TILES), fitting) <= self.gpu.shared:
                break
        return fitting

    @property
    def pitch(self) -> int:
        return self._pitch(self.warps)

    def _pitch(self, warps: int) -> int:
        """From a row of a stage to the next: a multiple of 16 that takes the rows to different banks."""
        chunks = ceil(warps * self.slice_bytes / 16) + (self.slice_bytes % 16 != 0)
        return 16 * (chunks + (1 - chunks % 2 if TYPES[self.ggml_type].words == 1 else (2 - chunks) % 4))

    def _slots(self, warps: int) -> int:
        """Tiles whose sums are kept; 0 for all: where warps go over them again, or other programs read them."""
        return SLOTS if self.slices <= warps and self.split == 1 else 0

    def _shared(self, stages: int, tiles: int, warps: int) -> int:
        by_16, by_32 = self.ggml_type in BY_16, self.ggml_type in BY_32
        portion, spread = (128, 112) if by_16 else (64, 48 if by_32 else 0)
        slots = self._slots(warps)
        scratch = max(8 * (portion * 2 + 16), TILE * (spread + slots * 32))
        zeros = 0 if spread and self.ggml_type is not GGMLType.IQ4_XS else 256
        sums = 0 if slots else tiles * ceil(self.m / 2) * 128
        return HEAD + stages * TILE * self._pitch(warps) + warps * (scratch + zeros + sums)

    @cached_property
    def stages_and_rows(self) -> tuple[int, int]:
        """Stages, each for a tile, as many as there is room for, and rows of the weight for a program."""
        rows = ceil(self.n / self.groups)
        tiles = ceil(rows / TILE)
        for stages in range(max(2, min(self.cut.stages, STAGES)), 1, -1):
            fits = self._shared(stages, tiles, self.warps) <= self.gpu.shared
            if fits and (tiles <= TILES or self._slots(self.warps)):
                return stages, rows
        tiles = min(tiles, TILES)  # more programs than run at once, then
        while tiles and self._shared(2, tiles, self.warps) > self.gpu.shared:
            tiles -= 1
        if not tiles:
            raise ValueError(f"{self} does not fit into shared memory")
        return 2, tiles * TILE

    @property
    def shared(self) -> int:
        stages, rows = self.stages_and_rows
        return self._shared(stages, ceil(rows / TILE), self.warps)

    @property
    def grid(self) -> int:
        return ceil(self.n / self.stages_and_rows[1]) * self.split

    @property
    def _long(self) -> bool:
        stages, rows = self.stages_and_rows
        return stages > 2 and ceil(rows / TILE) >= LONG and self._slots(self.warps) > 0

    @property
    def _copiers(self) -> int:
        return 3 if self._long else 1

    @property
    def threads(self) -> int:
        return (self.warps + self._copiers + 1) * 32

    def definitions(self, x: torch.dtype, out: torch.dtype) -> tuple[str, ...]:
        """What the source is compiled with, for the types of x, bfloat16 or float16, and of the result."""
        facts = {
            "TYPE": int(self.ggml_type),
            "X_IS_F16": int(x == torch.float16),
            "OUT_IS_F32": int(out == torch.float32),
            "WARPS": self.warps,
            "PITCH": self.pitch,
            "SPLIT": self.split,
            "ONCE": int(self.slices <= self.warps),
            "ODD": int(self.ggml_type in HALVES and self.k // SLICE % 2),
            "SLOTS": self._slots(self.warps),
            "COPIERS": self._copiers,
            "AHEAD": 2 if self._long else 0,
        }
        return tuple(f"-D{name}={value}" for name, value in facts.items())
