"""Show the user how far long work is, in the bar of the node that runs, and let Cancel end it.

The bar appears when work has taken a moment, the words (how fast, how long still) and the line in the log after more
of it: what is done at once shows nothing. The host's exception for a cancelled prompt is raised where somebody tells of
progress, so that whoever does must be ready to be broken off there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils

from . import compat
from .read_ahead import Told
from .sizes import size

log = logging.getLogger("sluice.progress")

BAR_AFTER = 0.5  # seconds
WORDS_AFTER, WORDS_EVERY = 2.0, 0.5
LINES_EVERY = 10.0


class Progress:
    """Of work on `total` bytes, or of what `amount` puts in words."""

    def __init__(
        self, what: str, total: int, amount: Callable[[float], str] = size, bar_after: float = BAR_AFTER
    ) -> None:
        self._what, self._total, self._amount = what, total, amount
        self._bar_after = bar_after
        self._bar: comfy.utils.ProgressBar | None = None
        self._began = self._last_line = time.monotonic()
        self._last_words = 0.0

    def at(self, done: int) -> None:
        """`done` of the total is done.

        Raises:
            comfy.model_management.InterruptProcessingException: the user pressed Cancel.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        passed = now - self._began
        if passed < self._bar_after:
            return
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(self._total)
        self._bar.update_absolute(done)
        if passed >= WORDS_AFTER and done and now - self._last_words >= WORDS_EVERY:
            self._last_words = now
            compat.show_text(self._words(done, passed))
        if done and now - self._last_line >= LINES_EVERY:
            self._last_line = now
            log.info("%s", self._words(done, passed))

    def end(self) -> None:
        """All is done. Where there was a bar, it is full now, and the words say what it took."""
        passed = time.monotonic() - self._began
        if self._bar is not None:
            self._bar.update_absolute(self._total)
        if self._last_words:
            compat.show_text(f"{self._what}: {self._amount(self._total)} in {passed:.1f} s ({self._rate(passed)})")

    def _words(self, done: int, passed: float) -> str:
        left = (self._total - done) * passed / done
        of = f"{self._amount(done)} of {self._amount(self._total)}"
        return f"{self._what}: {of}, {self._rate(passed, done)}, {left:.0f} s left"

    def _rate(self, passed: float, done: int | None = None) -> str:
        return f"{self._amount((self._total if done is None else done) / max(passed, 1e-3))}/s"


@contextmanager
def watched(what: str, total: int) -> Iterator[Told]:
    """Around work on `total` bytes: told of each amount that is done, it shows them and ends the work on Cancel."""
    progress, done = Progress(what, total), 0

    def told(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress.at(done)

    yield told
    progress.end()
