"""Which tensors of a model stay in VRAM and which stream through it: arithmetic on data, decided before anything moves.

A step takes `max(sum of compute, streamed bytes / link)` if copies neither starve the compute nor wait for room. Both
hold when each block streams bytes *in proportion to its compute time*, so that at every moment of the step the copies
are as far as the compute. Streaming the last K blocks, every n-th or the same share of each costs up to 1.6 times as
much where copies take as long as compute: here they fall behind, there they stand still.

- Small tensors always stay. The bytes to stream are poured over the blocks in proportion to their seconds, no block
  taking more than it has; whole tensors are chosen with the rounding error handed on (`shares`).
- Where copies bind by far, the compute hides in any case, and even chunks make the ring shorter, which lets more
  weights stay. So proportion to the square root of the seconds, and even shares, are tried too.
- All VRAM that the resident tensors leave is the ring (`ring`), so how much to stream is the one quantity to search:
  more streaming makes a longer ring, which smooths, and costs time on the link. The event model (`simulate`) judges.

More VRAM therefore takes away first what makes the step long, and what the last megabytes go to is not a rule but an
outcome. A plan is frozen, and equal inputs give equal plans. The streamer does, for every block of every step:

    wait for the block's own copies; compute; mark the block free; enqueue `plan.copies_after(block)`

and starts with `plan.first_copies`. All copies go to one stream, in the order in which they are enqueued.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..loaders.sizes import aligned, gb_up, size
from .costs import AUTO, GB, BlockCost, Link, ms
from .ring import Copy, Ring, Stream
from .shares import Chosen, diffuse, spread, water_fill
from .simulate import step_seconds

LEVELS = 1 << 10  # how finely the streamed bytes are searched: 0.1 % of the model
COARSE = 16  # levels between those at which the least that fits is looked for first
EVENNESS = (1.0, 0.5, 0.0)  # powers of the compute time that shares are proportional to
AS_FAST = 1.002  # plans within this are equally fast, and the one that streams less is better


class BudgetTooSmallError(ValueError):
    """No plan fits the VRAM budget; `smallest_bytes` would do."""

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


@dataclass(frozen=True)
class StreamPlan:
    """What stays, what streams, where it goes and what that should cost."""

    blocks: tuple[BlockCost, ...]
    copies: tuple[Copy, ...]  # of one step, in order; tensors that are not among them are resident
    ring_bytes: int
    link: Link
    budget_bytes: int
    outside_bytes: int  # weights outside the blocks, always resident
    prefetch_blocks: int
    blocks_to_swap: int
    step_seconds: float  # predicted

    @cached_property
    def streamed_bytes(self) -> int:
        return sum(copy.nbytes for copy in self.copies)

    @cached_property
    def resident_bytes(self) -> int:
        """In VRAM for good: the blocks' resident tensors and what lies outside the blocks."""
        return everything(self.blocks, self.outside_bytes) - sum(aligned(copy.nbytes) for copy in self.copies)

    @property
    def vram_bytes(self) -> int:
        return self.resident_bytes + self.ring_bytes

    @cached_property
    def compute_seconds(self) -> float:
        return sum(block.compute_seconds for block in self.blocks)

    @cached_property
    def copy_seconds(self) -> float:
        return sum(self.link.seconds(copy.nbytes) for copy in self.copies)

    @property
    def bound_by(self) -> str:
        """Which of the two the step waits for: 'compute' or 'copy'."""
        return "copy" if self.copy_seconds > self.compute_seconds else "compute"

    @property
    def first_copies(self) -> tuple[Copy, ...]:
        """What the first step may copy before any block has computed."""
        return tuple(copy for copy in self.copies if copy.after >= copy.block)

    def copies_after(self, block: int) -> tuple[Copy, ...]:
        """What may be copied once `block` has computed: for blocks after it, and then for blocks of the next step."""
        mine = [copy for copy in self.copies if copy.after == block]
        return tuple(sorted(mine, key=lambda copy: copy.block <= block))

    def streamed(self, block: int) -> tuple[int, ...]:
        """The tensors of one block that stream, by their place in its `tensor_bytes`."""
        return tuple(copy.tensor for copy in self.copies if copy.block == block)

    def __str__(self) -> str:
        if not self.copies:
            return f"all weights, {size(self.vram_bytes)}, stay; nothing streams"
        return (
            f"{size(self.resident_bytes)} of weights stay, {size(self.streamed_bytes)} stream each step through a ring "
            f"of {size(self.ring_bytes)} ({size(self.vram_bytes)} of {size(self.budget_bytes)} VRAM); "
            f"compute {ms(self.compute_seconds)}, copies {ms(self.copy_seconds)} at "
            f"{self.link.bytes_per_second / GB:.1f} GB/s: {self.bound_by} binds, predicted step {ms(self.step_seconds)}"
        )

    def table(self) -> str:
        """One line for each block."""
        width = max(len(block.name) for block in self.blocks)
        return "\n".join(
            f"{block.name:{width}}  {len(streamed):2} of {len(block.tensor_bytes):2} tensors stream, "
            f"{size(sum(block.tensor_bytes[i] for i in streamed)):>9} of {size(block.nbytes):>9}; "
            f"computes {ms(block.compute_seconds)}"
            for number, block in enumerate(self.blocks)
            for streamed in [self.streamed(number)]
        )


def make_plan(
    blocks: Sequence[BlockCost],
    link: Link,
    budget_bytes: int,
    *,
    prefetch_blocks: int = 1,
    blocks_to_swap: int = AUTO,
    outside_bytes: int = 0,
) -> StreamPlan:
    """The fastest plan found whose resident weights and ring fit into `budget_bytes`.

    Args:
        prefetch_blocks: the ring holds a block's streamed tensors and those of this many streamed blocks after it. It
            becomes longer than that where VRAM is left and `blocks_to_swap` is AUTO.
        blocks_to_swap: stream this many whole blocks, spread evenly over the compute time; AUTO: what is fastest. The
            ring holds fewer blocks than `prefetch_blocks` says if it would hold all of them: that would free nothing.
        outside_bytes: resident weights outside the blocks; they are part of the budget.

    Raises:
        BudgetTooSmallError: says the smallest budget that works and what else helps.
        ValueError: there are fewer blocks than `blocks_to_swap`, or none.
    """
    if not blocks:
        raise ValueError("Block Swap: no blocks were found in this model, so nothing can stream; remove the node.")
    if blocks_to_swap > len(blocks):
        raise ValueError(
            f"Block Swap: blocks_to_swap is {blocks_to_swap}, but this model has {len(blocks)} blocks. "
            f"Choose 0 to {len(blocks)}, or -1 for what is fastest within the budget."
        )
    search = _Search(tuple(blocks), link, budget_bytes, outside_bytes, prefetch_blocks, blocks_to_swap)
    best = None
    for plan in search.plans():
        if best is None or plan.step_seconds * AS_FAST < best.step_seconds:
            best = plan
    if best is None:
        raise search.too_small()
    return best


@dataclass(frozen=True)
class _Search:
    """The candidates for one set of inputs."""

    blocks: tuple[BlockCost, ...]
    link: Link
    budget: int
    outside: int
    depth: int
    swap: int

    @cached_property
    def _everything(self) -> int:
        return everything(self.blocks, self.outside)

    def plans(self) -> Iterator[StreamPlan]:
        """Candidates that fit. Automatic: for each evenness, streaming ever more from the least that fits."""
        if self.swap != AUTO:
            yield from self._fitting([spread(self.blocks, self.swap)])
            return
        best = float("inf")
        for power in EVENNESS:
            for plan in self._fitting(self._upwards(power)):
                if plan.copy_seconds >= best:
                    break  # from here on, copying alone takes longer
                yield plan
                best = min(best, plan.step_seconds)
                if best <= AS_FAST * max(plan.compute_seconds, plan.copy_seconds):
                    break

    def _upwards(self, power: float) -> Iterator[Chosen]:
        coarse = next((level for level in range(0, LEVELS + 1, COARSE) if self._ring(self._chosen(level, power))), None)
        if coarse is None:
            return
        finer = range(max(0, coarse - COARSE + 1), coarse + 1)
        level = least = next(level for level in finer if self._ring(self._chosen(level, power)))
        while level < LEVELS:
            yield self._chosen(level, power)
            level += 1 + (level - least) // 2
        yield self._chosen(LEVELS, power)

    def _chosen(self, level: int, power: float) -> Chosen:
        weights = [block.compute_seconds**power for block in self.blocks]
        capacities = [block.streamable_bytes for block in self.blocks]
        return diffuse(self.blocks, water_fill(capacities, weights, sum(capacities) * level / LEVELS))

    def _stream(self, chosen: Chosen) -> Stream:
        pairs = zip(self.blocks, chosen, strict=True)
        chunks = [[(i, block.tensor_bytes[i]) for i in chunk] for block, chunk in pairs]
        stream, depth = Stream(chunks, self.depth), self.depth
        while self.swap != AUTO and depth and stream.smallest_ring().nbytes >= stream.nbytes:
            depth -= 1  # a ring for all that streams would free nothing, and a few swapped blocks are far apart
            stream = Stream(chunks, depth)
        return stream

    def _ring(self, chosen: Chosen) -> Ring | None:
        stream = self._stream(chosen)
        room = self.budget - self._everything + stream.nbytes
        if self.swap != AUTO:  # who names a number of blocks wants their VRAM back
            room = min(room, stream.smallest_ring().nbytes)
        return stream.largest_ring(room)

    def _fitting(self, candidates: Iterator[Chosen] | list[Chosen]) -> Iterator[StreamPlan]:
        compute = [block.compute_seconds for block in self.blocks]
        for chosen in candidates:
            ring = self._ring(chosen)
            if ring:
                seconds = predict(compute, ring.copies, self.link)
                sizes = (ring.nbytes, self.link, self.budget, self.outside, self.depth, self.swap)
                yield StreamPlan(self.blocks, ring.copies, *sizes, seconds)

    def too_small(self) -> BudgetTooSmallError:
        smallest = self._smallest()
        remedies = [f"raise vram_budget_gb to {gb_up(smallest)} if it is set", "free VRAM (close other programs)"]
        if self.swap != AUTO:
            remedies.append("swap more blocks, or -1 of them for what is fastest")
        if self.depth and (less := replace(self, depth=0)._smallest()) < smallest:
            remedies.append(f"set prefetch_blocks to 0, which needs {size(less)} and is slower")
        message = (
            f"Block Swap: the weights may take {size(self.budget)} of VRAM, but need {size(smallest)} even when as "
            f"much as possible streams. To go on: {'; '.join(remedies)}; or use a smaller quantisation, image or batch."
        )
        return BudgetTooSmallError(message, smallest)

    def _smallest(self) -> int:
        """Over the candidates that every search looks at."""
        if self.swap != AUTO:
            candidates = [spread(self.blocks, self.swap)]
        else:
            candidates = [self._chosen(level, power) for power in EVENNESS for level in range(0, LEVELS + 1, COARSE)]
        streams = (self._stream(chosen) for chosen in candidates)
        return min(self._everything - stream.nbytes + stream.smallest_ring().nbytes for stream in streams)


def everything(blocks: Sequence[BlockCost], outside_bytes: int) -> int:
    return outside_bytes + sum(aligned(nbytes) for block in blocks for nbytes in block.tensor_bytes)


def predict(compute: Sequence[float], copies: Sequence[Copy], link: Link, **steps: int) -> float:
    """Seconds of a step in the steady state, by the event model."""
    timed: list[list[tuple[float, int]]] = [[] for _ in compute]
    for copy in copies:
        timed[copy.block].append((link.seconds(copy.nbytes), copy.after))
    return step_seconds(compute, timed, **steps)
