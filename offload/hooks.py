"""Follow a network's blocks: told before and after each forward, by torch's own hooks.

Whoever is told is not kept alive by that, and the network is not kept alive by whoever is told, so that a model which
nobody uses any more goes at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Follower(Protocol):
    def enter(self, block: int) -> None:
        """The block computes next, on the current stream."""

    def exit(self, block: int) -> None:
        """It has computed, or failed. Not told when the host breaks a run off with what is no `Exception`."""


class Following:
    """The hooks of one follower, on behalf of one patcher at a time, of which the network may have several."""

    def __init__(self) -> None:
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._patcher: Callable[[], object | None] = lambda: None  # weakly

    def begin(self, modules: Sequence[torch.nn.Module], follower: Follower, patcher: object) -> None:
        """Tell `follower` of the forward of each of `modules`, by number, until `end`; nothing where that has begun."""
        if self._handles:
            return
        self._patcher, reference = weakref.ref(patcher), weakref.ref(follower)
        for number, module in enumerate(modules):
            before, after = _hooks(reference, number)
            self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))

    def end(self, patcher: object | None = None) -> bool:
        """For everybody; or unless it is on behalf of another than `patcher`, who is still there. Whether it ended."""
        if patcher is not None and self._patcher() not in (None, patcher):
            return False
        while self._handles:
            self._handles.pop().remove()
        return True


def _hooks(reference: weakref.ref[Follower], block: int) -> tuple[Callable, Callable]:
    def enter() -> None:
        if (follower := reference()) is not None:
            follower.enter(block)

    def leave() -> None:
        if (follower := reference()) is not None:
            follower.exit(block)

    # To go through `disable` takes longer than all that a hook has to do, so only where a compiler looks on.
    uncompiled_enter, uncompiled_leave = torch.compiler.disable(enter), torch.compiler.disable(leave)

    def before(module: torch.nn.Module, args: object) -> None:
        (uncompiled_enter if torch.compiler.is_compiling() else enter)()

    def after(module: torch.nn.Module, args: object, output: object) -> None:
        (uncompiled_leave if torch.compiler.is_compiling() else leave)()

    return before, after
