"""Kernels for LoRAs, compiled while the LoRA is still on its way.

A kernel that adds the product of a rank compiles in half a second, once on a machine (Triton keeps it on disk). As
soon as somebody knows the rank, some threads begin: they compile while the file is read and the factors travel, mostly
outside of Python, and a step that asks for a kernel which is being compiled waits for that (kernels/kept.py). Of what
fails here the report says why (`dispatch.choices`), nobody else: the step will try for itself, and complain then.

Several LoRAs come one after the other, and only the sum of their ranks will be asked for. So of kernels for the same
type of weights, the last wanted is compiled; what was wanted a moment before it and has not begun is not.

[Note: Idle]
Half a second is long for who chooses a LoRA and waits. So after a model's first run, while somebody looks at the
picture, the kernels for the ranks that most LoRAs have are compiled, too: one at a time, by one thread that waits as
long as a model is run, and a moment after one begins to load or somebody wants another kernel. When the process is to
end, the kernel that it is at is the last. From the next start on they come from the disk, in milliseconds each.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..gguf.types import GGMLType
from . import dispatch

log = logging.getLogger("sluice.quant")

QUIET = 0.03  # seconds in which nobody wants another kernel instead
THREADS = 2  # that compile at once: models of two types of weights are common
COMMON_RANKS = (32, 16, 64, 128, 8)  # one kernel serves all multiples of 16 up to a power of 2
PATIENCE = 0.3  # seconds in which nobody wants anything, before something is compiled that nobody may ever want
LONGEST = 3600.0  # seconds that a run is believed to last if nobody says that it has ended


@dataclass(frozen=True)
class Wanted:
    """Weights of `shape` on a device with products added to some rows: (start, stop, rank), which do not overlap."""

    device: torch.device
    ggml_type: GGMLType
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[int, int, int], ...]

    @property
    def kind(self) -> tuple:
        """Of all that have it, those that came last are compiled."""
        return self.device, self.ggml_type, self.dtype


_last: dict[tuple, object] = {}  # kind -> the last call that wanted some of it
_lock = threading.Lock()
_turns = threading.BoundedSemaphore(THREADS)
_later: deque[Wanted] = deque()
_ever_later: set[Wanted] = set()
_idler: threading.Thread | None = None
_busy_until = 0.0  # in the clock of `time.monotonic`


def compile_soon(wanted: Iterable[Wanted]) -> None:
    """Begin compiling what `wanted` will need, on devices that compile anything, and return."""
    by_kind: dict[tuple, list[Wanted]] = {}
    for one in wanted:
        if one.device.type == "cuda":
            by_kind.setdefault(one.kind, []).append(one)
    busy()
    with _lock:
        for kind, found in by_kind.items():
            _last[kind] = call = object()
            threading.Thread(target=_in_turn, args=(call, found), name="sluice-compile").start()


def compile_when_idle(wanted: Iterable[Wanted]) -> None:
    """By [Note: Idle], each once in a process, in the order given; and return at once."""
    global _idler
    with _lock:
        new = [one for one in dict.fromkeys(wanted) if one.device.type == "cuda" and one not in _ever_later]
        _ever_later.update(new)
        _later.extend(new)
        if _later and _idler is None:
            _idler = threading.Thread(target=_idle, name="sluice-compile-idle")
            _idler.start()


def busy(seconds: float = PATIENCE) -> None:
    """Something begins that nothing is to be in the way of, and takes so long."""
    global _busy_until
    _busy_until = max(_busy_until, time.monotonic() + seconds)


def done() -> None:
    """What was said to take long has ended."""
    global _busy_until
    _busy_until = time.monotonic() + PATIENCE


def _idle() -> None:
    global _idler
    while True:
        while threading.main_thread().is_alive() and time.monotonic() < _busy_until:
            time.sleep(QUIET)
        with _lock:
            if not _later or not threading.main_thread().is_alive():
                _later.clear()
                _idler = None
                return
            one = _later.popleft()
        _try(one)


def _in_turn(call: object, found: list[Wanted]) -> None:
    with _turns:
        _compile(call, found)


def _compile(call: object, found: list[Wanted]) -> None:
    if _last[found[0].kind] is call:
        time.sleep(QUIET)
    for one in found:
        if _last[one.kind] is not call or not _try(one):
            return


def _try(one: Wanted) -> bool:
    parts = [(slice(start, stop), rank) for start, stop, rank in one.parts]
    try:
        dispatch.compile_with_products(one.ggml_type, one.shape, one.dtype, parts, one.device)
    except Exception as error:  # Triton raises anything
        log.debug("a kernel for a LoRA on %s could not be compiled ahead: %s", one.ggml_type.name, error)
        return False
    return True
