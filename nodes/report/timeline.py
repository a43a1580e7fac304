"""Memory over the time of one prompt: a bounded list of samples, and marks where a stage or a label begins.

Samples come when something happens (a node starts or ends, a sampler's step), never from a thread of its own. When the
list is full, each two neighbours become one that has the larger of both in every column, so that a peak is never lost,
only when it was becomes less exact; from then on samples are taken half as often.

Written by the thread that runs the prompt, read by the server's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

COLUMNS = ("vram_used", "vram_allocated", "ram_anonymous", "ram_file")  # bytes
MOST_SAMPLES = 256
MOST_MARKS = 64
SECONDS_BETWEEN = 0.1

Values = tuple["int | None", ...]  # in the order of COLUMNS; None where the system does not say


@dataclass(frozen=True)
class Mark:
    """Something begins: a stage of the prompt (encode, sample, decode, load), or what a Memory Report node says."""

    ms: float
    stage: str | None
    label: str | None
    node: str | None


class Timeline:
    """Of one prompt; `begin` starts over.

    Args:
        measure: gives the values of a sample.
        clock: seconds, monotonic.
    """

    def __init__(self, measure: Callable[[], Values], clock: Callable[[], float] = time.monotonic) -> None:
        self._measure, self._clock = measure, clock
        self._lock = threading.Lock()
        self.begin(None)

    def begin(self, prompt: str | None) -> None:
        with self._lock:
            self.prompt = prompt
            self._began = self._clock()
            self._between = SECONDS_BETWEEN
            self._last = float("-inf")  # when the last sample was taken, since the beginning
            self._samples: list[tuple[float, Values]] = []
            self._marks: list[Mark] = []

    def sample(self, always: bool = False) -> None:
        """Take a sample, unless one was taken just before."""
        now = self._clock() - self._began
        if not always and now - self._last < self._between:
            return
        values = self._measure()
        with self._lock:
            self._last = now
            self._samples.append((now, values))
            if len(self._samples) > MOST_SAMPLES:
                self._samples = _halved(self._samples)
                self._between *= 2

    def mark(self, stage: str | None = None, label: str | None = None, node: str | None = None) -> None:
        """Something begins now. A stage that goes on is marked once; of more than MOST_MARKS the first stay."""
        self.sample(always=True)
        with self._lock:
            stages = [mark.stage for mark in self._marks if mark.stage is not None]
            goes_on = label is None and stages[-1:] == [stage]
            if not goes_on and len(self._marks) < MOST_MARKS:
                self._marks.append(Mark(round(self._last * 1e3, 1), stage, label, node))

    @property
    def stage(self) -> str | None:
        with self._lock:
            return next((mark.stage for mark in reversed(self._marks) if mark.stage is not None), None)

    def data(self) -> dict:
        """As the report has it: samples as lists of milliseconds and then COLUMNS."""
        with self._lock:
            samples, marks, prompt = list(self._samples), list(self._marks), self.prompt
        return {
            "prompt_id": prompt,
            "columns": ["ms", *COLUMNS],
            "samples": [[round(when * 1e3, 1), *values] for when, values in samples],
            "peak": dict(zip(COLUMNS, _largest(*(values for _, values in samples)), strict=True)),
            "marks": [vars(mark).copy() for mark in marks],
        }


def _halved(samples: list[tuple[float, Values]]) -> list[tuple[float, Values]]:
    pairs = [samples[i : i + 2] for i in range(0, len(samples), 2)]
    return [(pair[-1][0], _largest(*(values for _, values in pair))) for pair in pairs]


def _largest(*several: Values) -> Values:
    columns = zip(*several, strict=True) if several else [()] * len(COLUMNS)
    return tuple(max((value for value in column if value is not None), default=None) for column in columns)
