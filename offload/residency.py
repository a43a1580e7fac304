"""Where the weights of one network are: which stay on the device, which stream, and the way from one plan to the next.

Every weight has its home in host memory. A *resident* one is shown to the network as a copy on the device, for as long
as the plan lasts; a *streamed* one is shown over the ring, only while its block computes, and everybody else who looks
at the network sees the home. So a pass that is broken off, a model that is saved or one that is patched never meets
the bytes of another weight.

    arrange(...)        make a plan for a budget, or keep the one there is, and carry it out
    follow()            be told when a block computes, to show it its streamed weights and to measure it
    leave()             all weights at home, no device memory, no file, no thread

What a block computes is measured in the first passes of every run, and the plan follows at the next pass when that
is worth the move (`replan`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..loaders.sizes import size
from .ahead import sendable, unchanged
from .block_times import BlockTimes
from .blocks import Block
from .costs import SMALL_BYTES, BlockCost, Link, SwapRequest
from .device import Device, device_for
from .errors import ArenaError, first_line
from .hooks import Following
from .link import link_of
from .outside import NOTHING, Outside
from .placed import Placed
from .plan import BudgetTooSmallError, StreamPlan, make_plan
from .replan import replan
from .runs import Run, runs_of
from .shelf import Shelf
from .slots import Slot, slots_of
from .source import Choice, choose
from .streaming import Streaming
from .terms import Foreseen, Terms

log = logging.getLogger("sluice.offload")

SMALL_SHARE = 16  # in a small network, what is below this part of the largest tensor is small, too
TRIES = 4  # plans for ever less VRAM after the device was out of memory
LESS = 0.8
NEARLY = 1.05  # times the smallest plan is no larger than that


class Residency:
    """Of one network and its clones. Used by one thread at a time.

    Args:
        blocks: disjoint, in the order in which they run.
        request: the user's dials.
        shelf: of the file that the weights are mapped from, if nobody else uses the mapping.
    """

    def __init__(self, blocks: Sequence[Block], request: SwapRequest, shelf: Shelf | None = None) -> None:
        self.request = request
        self.shelf = shelf
        self.names = [block.name for block in blocks]
        self._modules = [block.module for block in blocks]
        self._blocks: list[list[Slot]] = [
            [slot for slot in slots_of(block.module.modules()) if slot.streams] for block in blocks
        ]
        largest = max((slot.nbytes for slots in self._blocks for slot in slots), default=0)
        self._small_bytes = min(SMALL_BYTES, max(largest // SMALL_SHARE, 1))
        self._runs: list[list[Run]] = []  # of each block: what a plan calls its tensors
        self._outside = NOTHING  # but while the weights are arranged
        self._placed = Placed()
        self._device: Device | None = None
        self._terms: Terms | None = None
        self._streaming: Streaming | None = None
        self._following = Following()
        self._last = -1
        self.plan: StreamPlan | None = None
        self.times: BlockTimes | None = None
        self.steps = 0  # passes on this plan
        self._next_look = 0  # the one of them before which a better plan is looked for again
        self.plans_made = 0

    # --- plans

    @property
    def arranged(self) -> bool:
        """Whether the weights lie where `plan` says."""
        return self._terms is not None

    @property
    def at_home(self) -> bool:
        """Whether nothing is on the device, and the weights' file could be opened."""
        return not self.arranged and (self.shelf is None or not self.shelf.holds_any)

    @property
    def vram_bytes(self) -> int:
        """What the device holds of this model now."""
        return self.plan.vram_bytes if self.plan is not None and self.arranged else 0

    def inside(self) -> list[Slot]:
        """The weights of the blocks that may stream."""
        return [slot for slots in self._blocks for slot in slots]

    def streamed_modules(self) -> dict[torch.nn.Module, None]:
        """The modules that the host must not move: those that hold a streamed parameter, and tables left in RAM."""
        streamed = self._streaming.modules() if self._streaming is not None else {}
        return streamed | {module: None for slot in self._outside.tables for module, _ in slot.owners}

    @property
    def choice(self) -> Choice | None:
        """Where streamed weights come from, while any stream."""
        return self._streaming.choice if self._streaming is not None else None

    def arrange(
        self, network: torch.nn.Module, device: torch.device, terms: Terms, foreseen: Foreseen | None = None
    ) -> bool:
        """Make the weights lie as the best plan for `terms` says; whether anything had to move. They may be on their
        way until `settle`.

        Args:
            foreseen: what `foresee` said for the same terms, which is not planned again then.

        Raises:
            BudgetTooSmallError: not even the smallest plan fits.
            torch.OutOfMemoryError, ArenaError: the device has less than it said, even for smaller plans.
        """
        if self._device is None or self._moved_away(device):
            self.leave()
            self._device = device_for(device)
            if self.times is None or self.times.device != self._device.torch_device:  # another one is faster or slower
                self.times = BlockTimes(len(self._blocks), self._device.torch_device)
        if not self.arranged:
            self._take_stock(network, terms)
        budget = terms.budget_bytes
        for attempt in range(TRIES):
            try:
                if foreseen is not None and not attempt:
                    plan, why = foreseen.plan, foreseen.why
                else:
                    plan, why = self._plan(replace(terms, budget_bytes=budget))
                if plan is self.plan and self._as_planned():
                    self._terms = terms
                    return False
                self._fetch_homes()
                self._carry_out(plan, why, terms)
                return True
            except (torch.OutOfMemoryError, ArenaError) as error:
                self.leave()
                self._take_stock(network, terms)
                if attempt + 1 == TRIES:
                    raise
                budget = int(min(budget, self.plan.vram_bytes if self.plan else budget) * LESS)
                self.plan = None
                log.warning("the GPU has less room than it said (%s); planning again for less", first_line(error))
        raise AssertionError("unreachable")

    def foresee(self, device: torch.device, terms: Terms) -> Foreseen | None:
        """What `arrange` would do, with its errors; None where it would have to look at the network first."""
        if not self.arranged or self._device is None or self._moved_away(device):
            return None
        plan, why = self._plan(terms)
        return Foreseen(plan, why, plan is self.plan and self._as_planned())

    def send_ahead(self, device: torch.device, terms: Terms, room: int) -> int:
        """Before `arrange`: send what the plan of last time leaves on the device, as far as its pages are locked and
        `room` bytes go; bytes. What the next plan does not leave there goes home, and so does all at `leave`."""
        if terms.kept is None or self._device is None or self._moved_away(device) or not self.at_home:
            return 0
        missing = unchanged((slot for slot in self._resident(self.plan) if slot not in self._placed), terms)
        chosen = sendable(missing, terms.located, terms.kept, room)
        if chosen:
            self._placed.send(chosen, self._device, lambda slot: None, terms)
        return sum(slot.nbytes for slot in chosen)

    def could_fit(self, budget_bytes: int) -> bool:
        """Whether there is a plan for `budget_bytes`."""
        if not self.arranged:
            return False
        try:
            self._make_plan(budget_bytes)
        except BudgetTooSmallError:
            return False
        return True

    def _moved_away(self, device: torch.device) -> bool:
        assert self._device is not None
        here = self._device.torch_device
        return device.type != here.type or (device.index is not None and device != here)

    def _plan(self, terms: Terms) -> tuple[StreamPlan, str]:
        assert self._device is not None
        try:
            if self.plan is not None and self.plan.outside_bytes == self._outside.nbytes:
                return replan(self.plan, self._costs(), self._link(), terms.budget_bytes, self.steps)
            return self._make_plan(terms.budget_bytes), "first plan"
        except BudgetTooSmallError as error:
            if not terms.budget_bytes < error.smallest_bytes <= terms.most_bytes:
                raise
            if self.plan is not None and self.plan.vram_bytes <= min(terms.most_bytes, NEARLY * error.smallest_bytes):
                return self.plan, ""  # as small as it gets: block times differ a little from run to run
            allowed, least = size(terms.budget_bytes), size(error.smallest_bytes)
            log.info("%s of VRAM were allowed for weights; %s is the least that works", allowed, least)
            return self._make_plan(error.smallest_bytes), "the smallest plan"

    def _make_plan(self, budget_bytes: int) -> StreamPlan:
        return make_plan(
            self._costs(),
            self._link(),
            budget_bytes,
            prefetch_blocks=self.request.prefetch_blocks,
            blocks_to_swap=self.request.blocks_to_swap,
            outside_bytes=self._outside.nbytes,
        )

    def _costs(self) -> list[BlockCost]:
        assert self.times is not None
        return [
            BlockCost(name, tuple(run.nbytes for run in runs), seconds, self._small_bytes)
            for name, runs, seconds in zip(self.names, self._runs, self.times.seconds(), strict=True)
        ]

    def _link(self) -> Link:
        assert self._device is not None
        return link_of(self._device, self.choice.source.kind if self.choice else None)

    def _reconsider(self) -> None:
        """Between two passes, when blocks have just been measured."""
        assert self.plan is not None and self._terms is not None
        if any(self._terms.patched_by_host(slot) for slots in self._blocks for slot in slots):
            return  # the host alone can put its patches on and off: the plan may change at the next load
        before = self.plan
        budget = max(self._terms.budget_bytes, before.budget_bytes)  # the smallest plan may take more than allowed
        try:
            plan, why = replan(before, self._costs(), self._link(), budget, self.steps)
        except BudgetTooSmallError:  # with the times as they are now; the plan there is does fit
            return
        if plan is before:
            return
        try:
            self._fetch_homes()
        except Exception as error:  # the plan that there is needs no file
            log.warning("a better plan needs the model's file: %s; the plan before stays", error)
            return
        try:
            self._carry_out(plan, why, self._terms)
        except (torch.OutOfMemoryError, ArenaError) as error:
            log.warning("the GPU has no room for a better plan (%s); the plan before stays", first_line(error))
            self._carry_out(before, "back to the plan before", self._terms)
        self.settle()
        self.close_file()

    # --- carrying a plan out

    def _take_stock(self, network: torch.nn.Module, terms: Terms) -> None:
        """What lies where, while everything is at home."""
        if (runs := runs_of(self._blocks, terms.located)) != self._runs:
            self._runs, self.plan = runs, None
        self._outside = Outside(network, self.inside(), self.request.offload_embeddings)

    def _as_planned(self) -> bool:
        streaming = self._streaming is not None or not (self.plan and self.plan.copies)
        return self.arranged and streaming and all(self._is_there(slot) for slot in self._resident(self.plan))

    def _carry_out(self, plan: StreamPlan, why: str, terms: Terms) -> None:
        assert self._device is not None
        self._stop_streaming()
        resident = self._resident(plan)
        staying = set(resident)
        self._placed.go_home([slot for slot in self._placed if slot not in staying])
        self.plan, self._terms, self.steps = plan, terms, 0
        self.plans_made += 1
        self._start_streaming(plan, terms)
        missing = [slot for slot in resident if not self._is_there(slot) and not terms.patched_by_host(slot)]
        self._placed.also(self._outside.bring_buffers(self._device, terms.may_pin))
        self._placed.send(missing, self._device, self._dtype, terms)
        log.info("%s: %s", why, plan)

    def _start_streaming(self, plan: StreamPlan, terms: Terms) -> None:
        if not plan.copies:
            return
        assert self._device is not None
        choice = choose(
            {(c.block, c.tensor): self._runs[c.block][c.tensor].weight(terms.located) for c in plan.copies},
            self._device,
            ram_budget_bytes=terms.pinned_budget_bytes,
            kind=self.request.weight_source,
            may_pin=terms.may_pin,
            watch=terms.watch,
            kept=terms.kept,
        )
        try:
            self._streaming = Streaming(plan, choice, self._runs, self._device, terms.account_pinned)
        except BaseException:
            choice.source.close()
            raise

    def _stop_streaming(self) -> None:
        self._last = -1
        if self._streaming is not None:
            streaming, self._streaming = self._streaming, None
            streaming.close()

    def leave(self) -> None:
        """All weights at home; idempotent. The plan is kept for the next time."""
        self._stop_streaming()
        if self.shelf is not None:
            try:
                self.shelf.bring_back()
            except Exception as error:  # whoever uses the model next is told
                log.warning("the model's weights are gone: %s; the next use says what to do", error)
        self._placed.stop()  # what an error left on its way, with nothing placed yet
        self._placed.go_home(self._placed)
        self._outside.leave_buffers()
        self._outside, self._terms = NOTHING, None

    def _resident(self, plan: StreamPlan | None) -> list[Slot]:
        streamed = {(copy.block, copy.tensor) for copy in plan.copies} if plan is not None else set()
        staying = [run for b, runs in enumerate(self._runs) for t, run in enumerate(runs) if (b, t) not in streamed]
        return [*self._outside.slots, *(slot for run in staying for slot in run.slots)]

    def _is_there(self, slot: Slot) -> bool:
        assert self._device is not None
        shown = slot.shown
        return shown is not None and shown.device == self._device.torch_device and (
            slot in self._placed or self._dtype(slot) in (None, shown.dtype)
        )  # fmt: skip

    def _dtype(self, slot: Slot) -> torch.dtype | None:
        assert self._terms is not None and self._device is not None
        if self._device.torch_device.type == "cpu" or slot.home.dtype.itemsize == 1:
            return None  # where they are already, and what a cast would destroy
        return self._terms.dtype_of(*slot.owners[0])

    def settle(self) -> None:
        """Wait for the weights that are on their way; SourceError if they are not what was loaded."""
        self._placed.wait()

    def adopt(self) -> None:
        """The host has put patched copies in the place of some resident weights: these are what lies there now."""
        self._placed.adopt(self._resident(self.plan))

    def close_file(self) -> None:
        """Once the host has done its part: let go of the model's file if no weight has to come from it."""
        terms, device = self._terms, self._device
        if self.shelf is None or terms is None or device is None or self.request.offload_embeddings:
            return
        copies = self._streaming.copies() if self._streaming is not None else {}
        if copies is None or (terms.kept is not None and terms.kept.nbytes):  # it is locked for the next time
            return
        if device.torch_device.type != "cpu" and all(slot in self._placed for slot in self._resident(self.plan)):
            self.shelf.put_away(self._placed, terms.located, copies)
            if self._streaming is not None:
                self._streaming.forget_homes()

    def _fetch_homes(self) -> None:
        """From the file, if they were put away."""
        if self.shelf is not None:
            self.restore()
            self.shelf.bring_back()

    def disown(self) -> None:
        """The host has taken its patched copies away."""
        self._placed.disown()

    # --- around the blocks

    def follow(self, patcher: object) -> None:
        """Be told of the network's blocks while anything streams, on behalf of `patcher`; `unfollow` ends that."""
        if self._streaming is not None:
            self._following.begin(self._modules, self, patcher)

    def unfollow(self, patcher: object | None = None) -> None:
        """For everybody, or for `patcher` alone."""
        if self._following.end(patcher):
            self.restore()

    def enter(self, block: int) -> None:
        if block <= self._last:
            self.steps += 1
            if self.arranged and self.times is not None and (self.times.complete() or self.steps == self._next_look):
                self._next_look = 2 * self.steps  # by then the present plan has lost twice as much
                self._reconsider()
        self._last = block
        if self._streaming is not None:
            self._streaming.enter(block)
        if self.times is not None:
            self.times.start(block)

    def exit(self, block: int) -> None:
        if self.times is not None:
            self.times.stop(block)
        if self._streaming is not None:
            self._streaming.exit(block)

    def restore(self) -> None:
        """Whatever was broken off, no weight is shown over the ring."""
        if self._streaming is not None:
            self._streaming.restore()
