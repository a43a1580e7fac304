"""Be told what the server does, by its own registry of progress: nodes that start and end, a sampler's steps.

The host makes a new registry for each prompt, with its own handler in it, and resets the handlers of the one before.
That reset is where this one asks to be put into the new registry, once the event loop of the prompt turns, which is
before the first node runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any

from comfy_execution.progress import ProgressHandler, add_progress_handler

from .stages import SAMPLE, stage_of_node
from .timeline import Timeline

NAME = "sluice"
FEWEST_BYTES = 1 << 20  # a progress bar of more counts bytes, not steps


class Follower(ProgressHandler):
    """Keeps the timeline, and calls `changed` whenever there is something new to tell."""

    def __init__(self, timeline: Timeline, changed: Callable[[], None]) -> None:
        super().__init__(NAME)
        self.timeline, self._changed = timeline, changed
        self._registry: Any = None
        self.node: str | None = None
        self.step = self.steps = 0
        self.step_ms: float | None = None  # of the sampler's last steps that were told of
        self._sampling = False
        self._told = 0.0  # when a step was told of last

    def set_registry(self, registry: Any) -> None:
        if registry is not self._registry:
            self._registry = registry
            self._enter(None, None)
            self.step_ms = None
            self.timeline.begin(registry.prompt_id or None)
            if registry.prompt_id:
                self.timeline.sample(always=True)

    def reset(self) -> None:
        try:
            asyncio.get_running_loop().call_soon(add_progress_handler, self)
        except RuntimeError:  # nobody runs a prompt
            return

    def start_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        stage = stage_of_node(self._registry.dynprompt.get_node(node_id))
        self._enter(node_id, stage)
        if stage is None:
            self.timeline.sample()
        else:
            self.timeline.mark(stage, node=node_id)
        self._changed()

    def update_handler(
        self, node_id: str, value: float, max_value: float, state: Any, prompt_id: str, image: Any = None
    ) -> None:
        if max_value >= FEWEST_BYTES:  # the bar of a file that is read or copied
            self.timeline.sample()
            self._changed()
            return
        now, done = time.perf_counter(), int(value) - self.step
        if self._sampling and self.step and done > 0:
            self.step_ms = (now - self._told) * 1e3 / done
        self.node, self.step, self.steps, self._told = node_id, int(value), int(max_value), now
        self.timeline.sample()
        self._changed()

    def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        if node_id == self.node:
            self.timeline.sample(always=True)
            self.node = None
        self._changed()

    def _enter(self, node: str | None, stage: str | None) -> None:
        self.node, self.step, self.steps, self._sampling = node, 0, 0, stage == SAMPLE

    def progress(self, running: Collection[str]) -> dict | None:
        """How far the prompt is, for the report, given the ids of those that run; None before the first."""
        if self.timeline.prompt is None:
            return None
        runs = self.timeline.prompt in running
        return {
            "id": self.timeline.prompt,
            "running": runs,
            "stage": self.timeline.stage,
            "node": self.node if runs else None,  # the end of a node that failed is not told
            "step": self.step,
            "steps": self.steps,
            "step_ms": None if self.step_ms is None else round(self.step_ms, 3),
        }
