"""How long one step takes when copies and compute overlap: an event model of the schedule that the streamer executes.

Two engines work in order, each on its own: the copy engine moves the streamed tensors of one block after another, step
after step without a break between steps; the compute engine runs the blocks. Two kinds of edges tie them, the same two
events that the streamer records on the GPU:

    ready   a block computes when its last tensor has arrived
    free    a tensor is copied when the last block that used its place in the ring has computed

The planner asks this model which of its candidates is fastest, and predicts the step from it. What it leaves out:
contention of copies and kernels for memory bandwidth, and launch latencies of the compute stream.
"""

from __future__ import annotations

from collections.abc import Sequence

WARM_UP = 4  # steps until the start from an empty ring has worn off
MEASURED = 4  # steps averaged: the steady state may repeat only every few steps


def step_seconds(
    compute: Sequence[float],
    copies: Sequence[Sequence[tuple[float, int]]],
    warm_up: int = WARM_UP,
    measured: int = MEASURED,
) -> float:
    """Seconds per step in the steady state.

    Args:
        compute: seconds of each block.
        copies: for each block its copies in order, each as its seconds and the block that frees its place. That block
            runs earlier in the same step if its number is smaller, and in the step before otherwise.
    """
    freed = [0.0] * len(compute)  # when each block last ended
    copied = computed = warm = 0.0
    for step in range(warm_up + measured):
        for block, seconds in enumerate(compute):
            if copies[block]:
                for duration, after in copies[block]:
                    free = freed[after]
                    copied = (copied if copied > free else free) + duration
                if copied > computed:
                    computed = copied
            computed += seconds
            freed[block] = computed
        if step == warm_up - 1:
            warm = computed
    # Neither engine can be faster than its own work, however far ahead the measured steps still ran from a full ring.
    alone = max(sum(compute), sum(duration for block in copies for duration, _ in block))
    return max((computed - warm) / measured, alone)
