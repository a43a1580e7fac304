"""LoRAs of a model whose weights stream: their bytes are a part of the plan's VRAM, and they stream if they must.

The factors of a LoRA are used at every step, like the weights beside which they lie, and are small. So they stay on
the device as long as there is a plan for the weights in what they leave. Where there is none, those of the blocks come
with their block, through a ring of their own that is filled from locked memory as the weights' ring is.

Strength and choice of LoRAs change nothing but this: what the weights stream from stays as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch

from .blocks import Block
from .costs import BlockCost, Link
from .device import Device
from .files import Weight
from .hooks import Following
from .plan import StreamPlan, make_plan
from .source import choose
from .streamer import BlockStreamer

ANY_LINK = Link(1e10)  # the plan's times do not matter: every block's tensors stream


class Function(Protocol):
    """What patches one weight at use, from tensors that the host moves to the device with the model."""

    stays_home: bool

    @property
    def nbytes(self) -> int:
        """What its tensors take on a device."""


class Packable(Function, Protocol):
    """One whose tensors can be handed to it for the length of a call."""

    @property
    def packed_bytes(self) -> int: ...

    def pack(self, memory: torch.Tensor) -> None: ...

    def over(self, memory: torch.Tensor) -> Any: ...

    def lend(self, device: torch.device, tensors: Any) -> Any: ...


@dataclass(frozen=True)
class Adapters:
    """The functions of a model: those that could stream by their block, and all others."""

    blocks: Sequence[tuple[Block, list[Packable]]]  # that have any, in order
    others: Sequence[Function]

    @staticmethod
    def of(blocks: Sequence[Block], functions: dict[torch.nn.Module, list[Function]]) -> Adapters:
        """The functions of each module, sorted."""
        by_block: list[tuple[Block, list[Packable]]] = []
        for block in blocks:
            of_block = [f for module in block.module.modules() for f in functions.get(module, ())]
            if found := [cast(Packable, f) for f in of_block if hasattr(f, "pack")]:
                by_block.append((block, found))
        inside = {id(function) for _, found in by_block for function in found}
        others = [f for found in functions.values() for f in found if id(f) not in inside]
        return Adapters(by_block, others)

    @property
    def nbytes(self) -> int:
        """VRAM, if all stay."""
        return sum(f.nbytes for f in self.others) + sum(f.nbytes for _, found in self.blocks for f in found)

    @property
    def least_bytes(self) -> int:
        """VRAM, if those of blocks stream."""
        return sum(f.nbytes for f in self.others) + (self.plan.vram_bytes if self.plan is not None else 0)

    @cached_property
    def plan(self) -> StreamPlan | None:
        if not self.blocks:
            return None
        costs = [BlockCost(b.name, (sum(f.packed_bytes for f in found),), 1.0, 1) for b, found in self.blocks]
        return make_plan(costs, ANY_LINK, 1 << 62, blocks_to_swap=len(costs))


class AdapterStream:
    """The functions of blocks, whose tensors are on the device while their block computes.

    Args:
        adapters: some of which are in blocks.
        account: told how many bytes of RAM of its own this keeps locked, and the same less when it closes.

    Raises:
        RuntimeError: the device has no room for the ring.
    """

    def __init__(
        self,
        adapters: Adapters,
        device: Device,
        pinned_budget_bytes: int,
        may_pin: bool,
        account: Callable[[int], None],
    ) -> None:
        assert adapters.plan is not None
        self._blocks, self._device = adapters.blocks, device
        packs = {(b, 0): _packed(found) for b, (_, found) in enumerate(adapters.blocks)}
        weights = {key: Weight(pack.nbytes, data=pack) for key, pack in packs.items()}
        choice = choose(weights, device, ram_budget_bytes=pinned_budget_bytes, may_pin=may_pin)
        try:
            self._streamer = BlockStreamer(adapters.plan, choice.source, device)
        except BaseException:
            choice.source.close()
            raise
        self._over: dict[int, list[Any]] = {}  # of a block: the functions' tensors over the ring, made once
        self._lent: list[tuple[Packable, Any]] = []
        self._inside: int | None = None
        self._following = Following()
        self._close = weakref.finalize(self, _close, self._streamer, account, choice.source.pinned_bytes)
        account(choice.source.pinned_bytes)
        self._streamer.prefetch(0)

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Meanwhile the host, which loads the model, moves none of them."""
        functions = [function for _, found in self._blocks for function in found]
        for function in functions:
            function.stays_home = True
        try:
            yield
        finally:
            for function in functions:
                function.stays_home = False

    def follow(self, patcher: object) -> None:
        """Be told when the blocks compute, on behalf of `patcher`; `unfollow` ends that."""
        self._following.begin([block.module for block, _ in self._blocks], self, patcher)

    def unfollow(self, patcher: object | None = None) -> None:
        """For everybody, or for `patcher` alone."""
        if self._following.end(patcher):
            self.restore()

    def enter(self, block: int) -> None:
        self.restore()
        (memory,) = self._streamer.wait(block).values()
        functions, self._inside = self._blocks[block][1], block
        if block not in self._over:
            slices = _slices(functions, memory)
            self._over[block] = [f.over(piece) for f, piece in zip(functions, slices, strict=True)]
        device = self._device.torch_device
        self._lent = [(f, f.lend(device, there)) for f, there in zip(functions, self._over[block], strict=True)]

    def exit(self, block: int) -> None:
        if self._inside == block:
            self.restore()
            self._streamer.release(block)

    def restore(self) -> None:
        """Nothing uses the ring."""
        self._inside = None
        while self._lent:
            function, before = self._lent.pop()
            function.lend(self._device.torch_device, before)

    def close(self) -> None:
        self.unfollow()
        self._over = {}
        self._close()


def _packed(functions: Sequence[Packable]) -> torch.Tensor:
    memory = torch.empty(sum(function.packed_bytes for function in functions), dtype=torch.uint8)
    for function, piece in zip(functions, _slices(functions, memory), strict=True):
        function.pack(piece)
    return memory


def _slices(functions: Sequence[Packable], memory: torch.Tensor) -> list[torch.Tensor]:
    return list(memory.split([function.packed_bytes for function in functions]))


def _close(streamer: BlockStreamer, account: Callable[[int], None], pinned_bytes: int) -> None:
    streamer.close()
    account(-pinned_bytes)
