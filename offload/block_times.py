"""How long each block computes, and each pass over all of them, measured while they run and without waiting.

On a GPU two events around the block tell, read a pass later when they are long past. The first pass over a model
compiles and allocates, so a block's time is the shortest of the first few; after those nothing is recorded until
`begin` asks again, because another image size is another time. A pass, from its start to the start of the next one, is
timed throughout; on a GPU that is two events a pass. It holds whatever the sampler does between two passes.
"""

from __future__ import annotations

import time
from collections import deque

import torch

PASSES = 3
KEPT_PASSES = 4  # the host enqueues passes ahead of the GPU; of so many, one has ended


class BlockTimes:
    """Of one network's blocks on one device. Used by one thread at a time."""

    def __init__(self, blocks: int, device: torch.device) -> None:
        self.device = device
        self._seconds: list[float | None] = [None] * blocks  # the shortest of this round
        self._known: list[float | None] = [None] * blocks  # of the last round that was complete
        self._running: dict[int, _CudaTimer | _HostTimer] = {}
        self._idle: dict[int, _CudaTimer | _HostTimer] = {}  # to be started again: making events is slow
        self._counts = [0] * blocks
        self._last = -1
        self._pass: _CudaTimer | _HostTimer | None = None
        self._passes: deque[_CudaTimer | _HostTimer] = deque(maxlen=KEPT_PASSES)

    def begin(self) -> None:
        """Measure anew, for instance because another run begins. What is known stays until the round is complete."""
        self._last, self._pass = -1, None
        self._running.clear()
        self._seconds = [None] * len(self._seconds)
        self._counts = [0] * len(self._counts)

    def start(self, block: int) -> None:
        """Just before the block computes, on the stream that it computes in."""
        if not -1 < self._last < block:
            self._begin_pass()
        self._last = block
        self._read(block)
        if self._counts[block] < PASSES and block not in self._running:  # else the GPU is a pass behind
            timer = self._running[block] = self._idle.pop(block) if block in self._idle else self._new_timer()
            timer.start()

    def stop(self, block: int) -> None:
        timer = self._running.get(block)
        if timer is not None and not timer.stopped:
            timer.stop()

    def complete(self) -> bool:
        """Whether a round just became complete: every block that runs at all was measured often enough."""
        if not self._running and not any(self._counts):
            return False
        for block in list(self._running):
            self._read(block)
        ran = [count for count in self._counts if count]
        if self._running or not ran or min(ran) < PASSES or self._known == self._seconds:
            return False
        self._known = list(self._seconds)
        return True

    def seconds(self) -> list[float]:
        """Of each block; the same for all as long as nothing is known. One that never ran counts as the shortest."""
        known = [s for s in self._known if s]
        if not known:
            return [1e-3] * len(self._known)
        return [s or min(known) for s in self._known]

    def measured(self) -> list[float | None]:
        """Seconds of each block, None where nothing is known. May be asked by another thread."""
        return list(self._known)

    def pass_seconds(self) -> float | None:
        """From the start of a pass to the start of the next, of the last pass that is known to have ended; None if
        there is none yet. May be asked by another thread."""
        ended = (timer.seconds() for timer in reversed(tuple(self._passes)))
        return next((seconds for seconds in ended if seconds is not None), None)

    def _begin_pass(self) -> None:
        if self._pass is not None:
            self._pass.stop()
            self._passes.append(self._pass)
        self._pass = self._new_timer()
        self._pass.start()

    def _new_timer(self) -> _CudaTimer | _HostTimer:
        return _CudaTimer(self.device) if self.device.type == "cuda" else _HostTimer()

    def _read(self, block: int) -> None:
        timer = self._running.get(block)
        seconds = timer.seconds() if timer is not None else None
        if seconds is None:
            return
        self._idle[block] = self._running.pop(block)
        self._counts[block] += 1
        if seconds > 0:
            self._seconds[block] = min(seconds, self._seconds[block] or seconds)


class _HostTimer:
    def __init__(self) -> None:
        self._began = 0.0
        self._took: float | None = None

    def start(self) -> None:
        self._began, self._took = time.perf_counter(), None

    @property
    def stopped(self) -> bool:
        return self._took is not None

    def stop(self) -> None:
        self._took = time.perf_counter() - self._began

    def seconds(self) -> float | None:
        return self._took


class _CudaTimer:
    """Of one GPU, whichever is the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.stopped = False

    def start(self) -> None:
        self.stopped = False
        self._began.record(torch.cuda.current_stream(self._device))

    def stop(self) -> None:
        self._ended.record(torch.cuda.current_stream(self._device))
        self.stopped = True

    def seconds(self) -> float | None:
        return self._began.elapsed_time(self._ended) / 1e3 if self.stopped and self._ended.query() else None
