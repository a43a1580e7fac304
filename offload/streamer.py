"""Carry out a plan: streamed weights are on the GPU when their block computes, and the GPU never waits for the CPU.

One allocation, the ring, holds the streamed tensors of the next blocks, each at the address that the plan gave it for
good. Two queues of the device work on it: the copy stream fills places, the compute stream, which is whatever stream
the caller computes in, uses them. Two events of every block order them, on the device:

    ready[i]   recorded on the copy stream after the copies of block i; compute waits for it in `wait`
    free[i]    recorded on the compute stream in `release`; a copy to a place where block i lay waits for it

[Note: What may be copied when] A plan names for each copy the block after which its place is free, which holds as long
as blocks run in order. They need not: caches skip blocks, patches call one twice, Cancel breaks a pass off. So this
does not count on it. It keeps which copies lie in the ring *now* (`_held`) and which block is *next* if they go on in
order. A copy is made ahead of time unless its place holds something that will be needed earlier. In order, that is the
plan's own rule; out of order it stays right, because `wait` looks at what is held and makes the copies that are
missing, in order, after all compute that used their places. That costs time and never the truth. What nothing has
overwritten is not copied again.

After the last block comes the first: the copies of the next step, or of the next call for the same step, are under way
while the last blocks still compute.

Used by one thread at a time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import torch

from .device import Device, Event, Stream
from .errors import ArenaError, SourceError, StreamError, first_line
from .host_memory import Source
from .plan import StreamPlan

log = logging.getLogger("sluice.offload")

POISON = 0xFF  # a NaN in every floating-point format, and no sound scale in any block format


class BlockStreamer:
    """The ring of one plan, fed from one source, which it closes in the end.

    Args:
        poison: overwrite a block's places when it is released, so that whoever uses them later cannot get away with it.

    Raises:
        ArenaError: the ring's allocation failed. The source is still the caller's, to use with another plan.
    """

    def __init__(self, plan: StreamPlan, source: Source, device: Device, *, poison: bool = False) -> None:
        self.plan, self.source = plan, source
        self.misses = 0  # how often a block had to wait for copies that had not even been enqueued
        self._device, self._poison = device, poison
        self._copies, self._blocks = plan.copies, len(plan.blocks)
        self._of_block: list[range] = _ranges(plan)
        self._blocks_by_copy = [copy.block for copy in plan.copies]
        self._overlaps = _overlaps(plan)
        self._users = [  # the blocks whose tensors, sooner or later, lie on some byte of a copy's place
            frozenset(self._copies[other].block for other in {k, *others}) for k, others in enumerate(self._overlaps)
        ]
        try:
            self._arena: torch.Tensor | None = device.allocate(plan.ring_bytes)
        except (RuntimeError, MemoryError) as error:
            raise ArenaError(plan.ring_bytes, first_line(error)) from error
        self._places = [self._arena[copy.offset : copy.offset + copy.nbytes] for copy in self._copies]
        self._views: list[Mapping[int, torch.Tensor]] = [
            MappingProxyType({self._copies[k].tensor: self._places[k] for k in numbers}) for numbers in self._of_block
        ]

        self._compute: Stream = device.compute_stream()
        self._copying: Stream = device.new_copy_stream()
        self._copy = [
            source.copier(copy.block, copy.tensor, place, self._copying)
            for copy, place in zip(self._copies, self._places, strict=True)
        ]
        self._ready: list[Event] = [device.new_event() for _ in plan.blocks]
        self._free: list[Event] = [device.new_event() for _ in plan.blocks]
        # The allocator may hand out memory that kernels enqueued earlier still use.
        allocated = device.new_event()
        device.record(allocated, self._compute)
        device.wait(self._copying, allocated)

        self._held: set[int] = set()  # copies whose bytes are in their places, or will be by order of the copy stream
        self._unawaited: set[int] = set()  # blocks released since the copy stream last waited for them
        self._using: int | None = None
        self._next = 0  # the block in use, or else the one that follows the last
        self._ahead = 0  # so many copies from the first of `_next` on are held
        self._more = True  # whether a copy may have become possible since `_advance` stopped

    def prefetch(self, block: int) -> None:
        """Say that `block` computes next: enqueue its copies, and further ones, as far as there is room.

        On the copy stream, after whatever compute used the places before. Never waits on the host. `release` does this
        for the following block, so call it only to start: after loading, or when blocks do not go on in order.
        """
        self._check_open()
        if self._using != block:
            self._stop_using()
            self._expect(block)
        self._advance()

    def wait(self, block: int) -> Mapping[int, torch.Tensor]:
        """The streamed tensors of `block` as bytes in the ring, by their number, for the stream that is current.

        That stream waits for the copies; the host only for bytes that a disk has not delivered yet. The views, which
        are the same for the life of the streamer, are the caller's to read until `release`, or until another block is
        asked for: a pass that was broken off never releases its last block, so asking for the next one does.

        Raises:
            SourceError: the bytes cannot be had. The streamer stays usable.
        """
        self._check_open()
        if self._using != block:
            self._stop_using()
            self._expect(block)
        numbers = self._of_block[block]
        if numbers:
            self._enter(block, numbers)
        self._using = block
        self._advance()
        return self._views[block]

    def _enter(self, block: int, numbers: range) -> None:
        """The stream that computes now goes on once the block's copies are made."""
        compute = self._device.compute_stream()
        if compute is not self._compute and compute != self._compute:
            # The events of the stream before would be recorded anew on this one, and its end forgotten.
            self._stop_using()
            self._await_released(set(self._unawaited))
            self._compute = compute
        missing = [] if self._held.issuperset(numbers) else [k for k in numbers if k not in self._held]
        if missing or numbers.start == 0:  # at least once a step
            self.source.check()
        if missing:
            self.misses += 1
            self._more = True
            self._issue(missing)
        self._device.wait(compute, self._ready[block])

    def release(self, block: int) -> None:
        """The caller has enqueued all that reads the views of `block`. Prefetches the blocks that follow.

        Records an event on the stream that `wait` was called in. A block that is not in use is passed over.
        """
        self._check_open()
        if self._using != block:
            return
        self._stop_using()
        self._expect((block + 1) % self._blocks)
        self._advance()

    def close(self) -> None:
        """Wait for the copies and the compute that was released, then free the ring and close the source; idempotent.

        A view that somebody kept keeps the ring's memory, with nothing of meaning in it.
        """
        if self._arena is None:
            return
        self._stop_using()
        self._arena = None
        self._places, self._views, self._copy = [], [], []
        self._held.clear()
        try:
            self._await_released(set(self._unawaited))
            self._device.synchronize(self._copying)
        finally:
            self.source.close()

    def _check_open(self) -> None:
        if self._arena is None:
            raise StreamError("the model was unloaded while it computed, so its weights no longer stream; run again")

    def _await_released(self, blocks: set[int]) -> None:
        for block in blocks:
            self._device.wait(self._copying, self._free[block])
        self._unawaited -= blocks

    def _expect(self, block: int) -> None:
        """Blocks go on with `block`."""
        if block == self._next and self._blocks > 1:
            return
        following = (self._next + 1) % self._blocks
        self._ahead = max(self._ahead - len(self._of_block[self._next]), 0) if block == following else 0
        self._next, self._more = block, True

    def _stop_using(self) -> None:
        block, self._using = self._using, None
        if block is None or not self._of_block[block]:
            return
        if self._poison:
            for k in self._of_block[block]:
                self._device.fill(self._places[k], POISON, self._compute)
            self._held.difference_update(self._of_block[block])
            self._more = True
        self._device.record(self._free[block], self._compute)
        self._unawaited.add(block)

    def _advance(self) -> None:
        """Enqueue what is next in order until something is in the way. See [Note: What may be copied when]."""
        if not self._more:
            return
        try:
            if self._issue(self._following()):
                self._device.submit(self._copying)
        except SourceError as error:  # `wait` meets it again, where the bytes are needed
            self._more = True
            log.debug("prefetching stopped: %s", error)

    def _following(self) -> Iterator[int]:
        """The next copies in order, each if it may be made when it is asked for."""
        count, start, held = len(self._copies), self._of_block[self._next].start, self._held
        self._more = False
        while self._ahead < count:
            k = (start + self._ahead) % count
            if k not in held:
                if self._is_needed_before(k):
                    return
                copy = self._copies[k]
                if not self.source.ready(copy.block, copy.tensor):
                    self._more = True
                    return
                yield k
            self._ahead += 1

    def _is_needed_before(self, k: int) -> bool:
        """Whether something in the place of copy `k` will be used before that copy would be."""
        blocks, held, first, count = self._blocks_by_copy, self._held, self._next, self._blocks
        distance = (blocks[k] - first) % count
        return any((blocks[other] - first) % count <= distance for other in self._overlaps[k] if other in held)

    def _issue(self, numbers: Iterable[int]) -> bool:
        """Enqueue these copies, blocks in one piece; whether there were any."""
        following = iter(numbers)
        if (first := next(following, None)) is None:
            return False
        block = self._blocks_by_copy[first]
        try:
            with self._device.on(self._copying):
                for k in itertools.chain((first,), following):
                    if (of := self._blocks_by_copy[k]) != block:
                        self._device.record(self._ready[block], self._copying)
                        block = of
                    # Not only of what is held: a poisoned place is free once the poison is in it.
                    if not self._unawaited.isdisjoint(self._users[k]):
                        self._await_released(self._unawaited & self._users[k])
                    self._held -= self._overlaps[k]
                    self._copy[k]()
                    self._held.add(k)
        finally:  # what is missing of it yet moves the event when it is enqueued
            self._device.record(self._ready[block], self._copying)
        return True


def _ranges(plan: StreamPlan) -> list[range]:
    """The copies of each block, by number; for a block without any, an empty range where they would be."""
    counts = [0] * len(plan.blocks)
    for copy in plan.copies:
        counts[copy.block] += 1
    ends = list(itertools.accumulate(counts, initial=0))
    if [copy.block for copy in plan.copies] != sorted(copy.block for copy in plan.copies):
        raise ValueError("the copies of a plan must be in the order of its blocks")
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def _overlaps(plan: StreamPlan) -> list[frozenset[int]]:
    """For each copy the others that use some byte of its place."""
    spans = [(copy.offset, copy.offset + copy.nbytes) for copy in plan.copies]
    found: list[set[int]] = [set() for _ in spans]
    active: list[int] = []
    for k in sorted(range(len(spans)), key=lambda k: spans[k]):
        active = [other for other in active if spans[other][1] > spans[k][0]]
        for other in active:
            if plan.copies[other].block == plan.copies[k].block:
                raise ValueError(f"block {plan.copies[k].block} has two tensors in one place of the ring")
            found[k].add(other)
            found[other].add(k)
        active.append(k)
        if spans[k][1] > plan.ring_bytes:
            raise ValueError(f"the ring has {plan.ring_bytes} bytes, a copy ends at {spans[k][1]}")
    return [frozenset(others) for others in found]
