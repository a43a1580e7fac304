"""What a plan is made from, as data: the blocks' weight and time, the link, and the user's dials.

Dials count GB of 10^9 bytes, everything else is in bytes and seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

AUTO = -1
SMALL_BYTES = 1 << 20  # norms and biases: a copy of them costs its latency and frees nothing, so they never stream
GB = 10**9


@dataclass(frozen=True)
class BlockCost:
    """What one block weighs and how long it computes. Tensors are known by their place in `tensor_bytes`."""

    name: str
    tensor_bytes: tuple[int, ...]
    compute_seconds: float
    small_bytes: int = SMALL_BYTES  # tensors below this never stream

    def __post_init__(self) -> None:
        if not (self.compute_seconds > 0 and math.isfinite(self.compute_seconds)):
            raise ValueError(
                f"block {self.name}: its compute time is {self.compute_seconds!r} s, but a plan needs a positive one. "
                "As long as nothing has been measured, give every block the same."
            )

    @property
    def nbytes(self) -> int:
        return sum(self.tensor_bytes)

    @cached_property
    def streamable(self) -> tuple[int, ...]:
        """The tensors that are worth a copy."""
        return tuple(i for i, nbytes in enumerate(self.tensor_bytes) if nbytes >= self.small_bytes)

    @cached_property
    def streamable_bytes(self) -> int:
        return sum(self.tensor_bytes[i] for i in self.streamable)


@dataclass(frozen=True)
class Link:
    """The way from where the weights lie to the GPU, as measured."""

    bytes_per_second: float
    latency: float = 5e-6  # of one copy, while others are queued

    def __post_init__(self) -> None:
        if not (self.bytes_per_second > 0 and self.latency >= 0):
            raise ValueError(f"{self}: the link's rate must be positive and its latency not negative; measure it again")

    def seconds(self, nbytes: int) -> float:
        return self.latency + nbytes / self.bytes_per_second


@dataclass(frozen=True)
class SwapRequest:
    """The dials of the Block Swap Config node. One of them matters; the rest have good defaults."""

    vram_budget_gb: float = 0.0  # for the model's weights and the ring; 0: what is free
    blocks_to_swap: int = AUTO  # whole blocks, spread evenly over the compute time; AUTO: what is fastest
    prefetch_blocks: int = 1  # streamed blocks that fit into the ring beside the one that computes, at least
    min_free_vram_gb: float = 0.5  # left alone, for other programs and for fragmentation
    weight_source: str = "auto"  # where on the ladder of sources to begin
    offload_embeddings: bool = False  # tables stay in RAM, only their rows travel

    def __post_init__(self) -> None:
        for dial, (low, high, meaning) in RANGES.items():
            value = getattr(self, dial)
            if not low <= value <= high:
                raise ValueError(f"Block Swap: {dial} is {value}. Choose {low} to {high}; {meaning}.")

    def budget(self, free_bytes: int, activation_bytes: int) -> int:
        """Bytes that weights and ring may take.

        Args:
            free_bytes: free VRAM as it would be without this model's weights: what they hold now is added back, or a
                model that is loaded would shrink at every look.
            activation_bytes: what a step needs beside the weights.
        """
        available = free_bytes - activation_bytes - round(self.min_free_vram_gb * GB)
        asked = round(self.vram_budget_gb * GB) or available
        return max(0, min(asked, available))


# Where a user may have streamed weights come from; `source.py` has the ladder.
SOURCES = ("auto", "page_cache", "pinned", "disk")

RANGES = {
    "vram_budget_gb": (0, 1024, "0 takes the VRAM that is free"),
    "blocks_to_swap": (AUTO, 1000, "-1 streams what is fastest within the budget"),
    "prefetch_blocks": (0, 40, "1 is enough almost always, and more VRAM serves better for resident weights"),
    "min_free_vram_gb": (0, 1024, "0.5 leaves room for other programs"),
}


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
