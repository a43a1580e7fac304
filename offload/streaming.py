"""A plan under way: its ring, and the weights of one block at a time shown to the network over it.

Outside of its block's forward a streamed weight is at home for everybody who looks. A run that is broken off leaves a
block that was entered and not left; its weights go home when the next one is entered, or when the host cleans up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch

from .device import Device
from .plan import StreamPlan
from .runs import Run
from .slots import Slot
from .source import Choice
from .streamer import BlockStreamer

# A module's parameters, the name of one, and what it is over the ring and at home. Data, because it is gone through
# twice for every block of every step.
Swap = tuple[dict[str, "torch.nn.Parameter | None"], str, torch.nn.Parameter, torch.nn.Parameter]


class Streaming:
    """Owns the streamer and, through it, the source; both close with it.

    Args:
        runs: the weights of every block, in the order of the plan's `tensor_bytes`.
        account: told how many bytes of RAM of its own the source keeps locked, and the same less when it closes.

    Raises:
        ArenaError: the ring's allocation failed. The choice's source is still the caller's.
    """

    def __init__(
        self,
        plan: StreamPlan,
        choice: Choice,
        runs: Sequence[Sequence[Run]],
        device: Device,
        account: Callable[[int], None],
    ) -> None:
        self.choice = choice
        self.streamer = BlockStreamer(plan, choice.source, device)
        self._runs = runs
        self._streamed = [slot for copy in plan.copies for slot in runs[copy.block][copy.tensor].slots]
        self._swaps: list[list[Swap]] = []  # of each block; made when it is entered first
        self._made_in_inference = False
        self._inside: int | None = None
        self._close = weakref.finalize(self, _close, self.streamer, account, choice.source.pinned_bytes)
        account(choice.source.pinned_bytes)
        self.streamer.prefetch(0)

    @property
    def inside(self) -> int | None:
        """The block that computes, or None between two."""
        return self._inside

    def copies(self) -> dict[Slot, torch.Tensor] | None:
        """Each streamed weight and its bytes in memory of the source's own; None where some come from elsewhere."""
        found: dict[Slot, torch.Tensor] = {}
        for copy in self.streamer.plan.copies:
            run, data = self._runs[copy.block][copy.tensor], self.choice.source.copy_of(copy.block, copy.tensor)
            if data is None:
                return None
            found.update((slot, data[at : at + slot.nbytes]) for slot, at in zip(run.slots, run.starts, strict=True))
        return found

    def forget_homes(self) -> None:
        """Some have changed, between two blocks."""
        self.restore()
        self._swaps = []

    def modules(self) -> dict[torch.nn.Module, None]:
        """Those that hold a streamed weight, in order."""
        return {module: None for slot in self._streamed for module, _ in slot.owners}

    def enter(self, block: int) -> None:
        """Show the streamed weights of `block`, which computes next.

        Raises:
            SourceError: their bytes cannot be had.
        """
        self.restore()
        views = self.streamer.wait(block)
        self._inside = block
        for parameters, name, there, _ in self._swaps_of(block, views):
            parameters[name] = there

    def exit(self, block: int) -> None:
        if self._inside == block:
            self.restore()
            self.streamer.release(block)

    def restore(self) -> None:
        """All weights at home."""
        block, self._inside = self._inside, None
        if block is not None:
            for parameters, name, _, home in self._swaps[block]:
                parameters[name] = home

    def close(self) -> None:
        self.restore()
        self._swaps = []
        for slot in self._streamed:
            slot.forget()
        self._close()

    def _swaps_of(self, block: int, views: Mapping[int, torch.Tensor]) -> list[Swap]:
        """What to put where for a block. Addresses in the ring never change, so each weight over it is made once."""
        inference = torch.is_inference_mode_enabled()
        if not self._swaps or self._made_in_inference != inference:
            # A tensor subclass works only in the mode that it was made in.
            self._swaps, self._made_in_inference = [[] for _ in self._runs], inference
        if views and not self._swaps[block]:
            over = [pair for tensor, view in views.items() for pair in self._runs[block][tensor].over(view)]
            self._swaps[block] = [(m._parameters, n, there, slot.home) for slot, there in over for m, n in slot.owners]
        return self._swaps[block]


def _close(streamer: BlockStreamer, account: Callable[[int], None], pinned_bytes: int) -> None:
    streamer.close()
    account(-pinned_bytes)
