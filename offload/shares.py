"""How the bytes to stream are shared among the blocks, and which whole tensors make up the shares."""

from __future__ import annotations

from collections.abc import Sequence

from .costs import BlockCost

Chosen = list[tuple[int, ...]]  # for each block the tensors that stream, in order


def water_fill(capacities: Sequence[int], weights: Sequence[float], total: float) -> list[float]:
    """Shares of `total` in proportion to `weights`; what a full block cannot take, the others share."""
    shares = [0.0] * len(weights)
    left, weight = total, sum(weights)
    for i in sorted(range(len(weights)), key=lambda i: capacities[i] / weights[i]):
        shares[i] = min(capacities[i], left * weights[i] / max(weight, weights[i]))
        left, weight = left - shares[i], weight - weights[i]
    return shares


def diffuse(blocks: Sequence[BlockCost], shares: Sequence[float]) -> Chosen:
    """Whole tensors whose bytes follow `shares` at every prefix: what one block rounds off is owed to the next.

    Large tensors first, because every copy costs its latency.
    """
    chosen, owed = [], 0.0
    for block, share in zip(blocks, shares, strict=True):
        owed += share
        tensors = []
        for i in sorted(block.streamable, key=lambda i: -block.tensor_bytes[i]):
            if owed > 0 and owed >= block.tensor_bytes[i] / 2:
                tensors.append(i)
                owed -= block.tensor_bytes[i]
        chosen.append(tuple(sorted(tensors)))
    return chosen


def spread(blocks: Sequence[BlockCost], count: int) -> Chosen:
    """`count` whole blocks, evenly spread over the compute time."""
    rate = count / sum(block.compute_seconds for block in blocks)
    chosen: Chosen = []
    owed, missing = 0.0, count
    for number, block in enumerate(blocks):
        owed += rate * block.compute_seconds
        take = missing > 0 and (owed >= 0.5 or missing == len(blocks) - number)
        owed, missing = owed - take, missing - take
        chosen.append(block.streamable if take else ())
    return chosen
