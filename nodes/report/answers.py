"""Ask what may never answer: a file on a drive that is gone makes whoever looks at it wait, for minutes or for ever.

Nothing can break such a call off. So it is made by a thread of its own, which is waited for only so long, and which
waits on. The threads are daemons, for the process must be able to end without them.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 0.3  # seconds; a local disk answers within microseconds, its thread may have to wait for a processor
FRESH, KEPT = 1.0, 10.0  # seconds

THERE, GONE, UNANSWERED = "there", "gone", "no answer"


@dataclass(frozen=True)
class Found:
    """What is known of a file: its size where it is THERE."""

    state: str = UNANSWERED
    nbytes: int | None = None


NO_ANSWER = Found()


class NoAnswerError(Exception):
    """Patience has come to its end."""


@dataclass
class _File:
    found: Found | None = None
    answered: float = 0.0  # when that was
    asked: float | None = None  # since when a thread waits for the next answer


class FileLooks:
    """The sizes of files, from any thread. Only who asks for a file for the first time waits, for `patience`.

    Whoever asks again soon is told what was found last, and a thread looks again if that is no longer fresh: to hand
    work to a thread and wait for it takes milliseconds where the machine is busy.

    Args:
        patience: seconds, for all files together; of a file that a thread has waited for longer nothing is known.
        fresh: seconds.
        kept: seconds after which what was found is not told any more.
        stat: as `os.stat`.
    """

    def __init__(
        self,
        patience: float = PATIENCE,
        fresh: float = FRESH,
        kept: float = KEPT,
        stat: Callable[[Path], os.stat_result] = os.stat,
    ) -> None:
        self._patience, self._fresh, self._kept, self._stat = patience, fresh, kept, stat
        self._answers = threading.Condition()
        self._files: dict[Path, _File] = {}

    def at(self, paths: Iterable[Path]) -> dict[Path, Found]:
        """What is known of each; NO_ANSWER of those whose drive is silent."""
        now = time.monotonic()
        with self._answers:
            wanted = {path: self._files.get(path, _File()) for path in paths}
            self._files = {path: file for path, file in self._files.items() if file.asked is not None} | wanted
            for path, file in wanted.items():
                if now - file.answered >= self._kept:
                    file.found = None
                if file.asked is None and (file.found is None or now - file.answered >= self._fresh):
                    file.asked = now
                    threading.Thread(target=self._look, args=(path, file), name="sluice-look", daemon=True).start()
            new = [file for file in wanted.values() if file.found is None and not self._is_late(file, now)]
            self._answers.wait_for(lambda: all(file.found is not None for file in new), self._patience)
            return {path: self._told(file) for path, file in wanted.items()}

    def _is_late(self, file: _File, now: float) -> bool:
        return file.asked is not None and now - file.asked > self._patience

    def _told(self, file: _File) -> Found:
        return NO_ANSWER if file.found is None or self._is_late(file, time.monotonic()) else file.found

    def _look(self, path: Path, file: _File) -> None:
        try:
            found = Found(THERE, self._stat(path).st_size)
        except (OSError, ValueError):  # ValueError: no name that a file could have
            found = Found(GONE)
        with self._answers:
            file.found, file.answered, file.asked = found, time.monotonic(), None
            self._answers.notify_all()


class Errands:
    """Calls of functions in threads of their own, at most `most` of them at once, for an event loop to await.

    Args:
        most: threads; each may be held up by a silent drive, and the server's own ones must not be.
        patience: seconds that a caller waits, for a free thread included.
    """

    def __init__(self, most: int, patience: float) -> None:
        self._free, self._patience = asyncio.Semaphore(most), patience

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`.

        Raises:
            NoAnswerError: it takes too long; it goes on, and keeps its thread until it ends.
            Exception: what the function raises.
        """
        asked = asyncio.ensure_future(self._run(function, *arguments))
        done, _ = await asyncio.wait({asked}, timeout=self._patience)
        if not done:
            asked.cancel()
            raise NoAnswerError(f"no answer within {self._patience:g} s")
        return asked.result()

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        await self._free.acquire()
        answer: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            self._free.release()
            if answer.done():  # nobody waits any more
                return
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        def go() -> None:
            result, failed = None, None
            try:
                result = function(*arguments)
            except BaseException as error:
                failed = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, failed)

        threading.Thread(target=go, name="sluice-errand", daemon=True).start()
        return await answer
