"""Lock the pages of models that are going to leave and come back before their first stage asks for them.

To lock pages takes longer than to copy them over a fast link, so a model's first switch takes twice the time of the
later ones (`kept`). But it is known when its Offload Mode node runs that it will come, and while the texts are read
and encoded the CPU has little to do: one thread reads then what of the files is not cached, and locks it, in the order
in which the stages come. Who is faster there locks for itself what he needs, cell by cell.

It ends where pages are given back, for whatever reason: what is locked after that would stay so for nobody.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

from ..loaders.read_ahead import read_ahead, unwatched
from .device import Device
from .errors import RefusedError, SourceError
from .files import OpenFiles, Weight
from .kept import Cell, KeptPages, Use

log = logging.getLogger("sluice.offload")

NAME = "sluice-lock-ahead"  # of the thread

_waiting: deque[tuple[Future[int], Callable[[], int]]] = deque()
_guard = threading.Lock()
_busy = False  # whether there is a thread, which ends when nothing waits


def lock_soon(pages: KeptPages, weights: Sequence[Weight], device: Device) -> Future[int]:
    """Have a thread lock the cells that `weights`, all in files, lie on, as far as may be; bytes of those it locked."""
    global _busy
    job: Future[int] = Future()
    with _guard:
        _waiting.append((job, partial(_lock, weakref.ref(pages), pages.times_given_back, weights, device)))
        start, _busy = not _busy, True
    if start:
        try:
            threading.Thread(target=_work, name=NAME).start()
        except RuntimeError as error:  # the system has no more threads, so that nothing is locked ahead
            _drop(error)
    return job


def _drop(error: Exception) -> None:
    global _busy
    with _guard:
        dropped, _busy = list(_waiting), False
        _waiting.clear()
    for job, _ in dropped:
        job.set_exception(error)


def _work() -> None:
    global _busy
    while True:
        with _guard:
            if not _waiting:
                _busy = False
                return
            job, work = _waiting.popleft()
        try:
            job.set_result(work())
        except BaseException as error:
            log.debug("locking weights ahead failed", exc_info=True)
            job.set_exception(error)


def _lock(of: weakref.ref[KeptPages], asked_at: int, weights: Sequence[Weight], device: Device) -> int:
    pages = of()
    if pages is None or pages.times_given_back != asked_at or (use := pages.use(device)) is None:
        return 0
    done, in_vain = 0, False
    try:
        files = OpenFiles(weights)
        try:
            for total in _locked(use, files, use.cells(weights)):
                done = total
                if pages.times_given_back != asked_at or not threading.main_thread().is_alive():
                    break
            files.check()
        finally:
            files.close()
    except (RefusedError, SourceError) as error:  # who needs the weights will say so, or do without
        log.debug("no more is locked ahead: %s", error)
        in_vain = isinstance(error, SourceError)
    finally:
        use.close()
        if in_vain or pages.times_given_back != asked_at:
            pages.give_back()
    return done


def _locked(use: Use, files: OpenFiles, cells: Iterable[Cell]) -> Iterator[int]:
    """Bytes that were locked up to each of `cells`, until one is refused."""
    by_name = {file.stored: file for file in files.all()}
    for file in by_name.values():
        use.mapped(file)
    done = 0
    for cell in cells:
        if cell not in use:
            stored, start, stop = cell
            read_ahead(by_name[stored].fileno(), [(start, stop)], unwatched, stored.path.name)
            if not use.lock(cell):
                break
            done += stop - start
        yield done
