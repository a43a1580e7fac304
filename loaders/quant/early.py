"""Kernels for LoRAs, compiled while the LoRA is still on its way.

A kernel that adds the product of a rank compiles in half a second, once on a machine (Triton keeps it on disk). As
soon as somebody knows the rank, some threads begin: they compile while the file is read and the factors travel, mostly
outside of Python, and a step that asks for a kernel which is being compiled waits for that (kernels/kept.py). What
fails here is forgotten: the step will try for itself, and say why it could not.

Several LoRAs come one after the other, and only the sum of their ranks will be asked for. So of kernels for the same
type of weights, the last wanted is compiled; what was wanted a moment before it and has not begun is not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..gguf.types import GGMLType
from . import dispatch

log = logging.getLogger("sluice.quant")

QUIET = 0.03  # seconds in which nobody wants another kernel instead
THREADS = 2  # that compile at once: models of two types of weights are common


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


def compile_soon(wanted: Iterable[Wanted]) -> None:
    """Begin compiling what `wanted` will need, on devices that compile anything, and return."""
    by_kind: dict[tuple, list[Wanted]] = {}
    for one in wanted:
        if one.device.type == "cuda":
            by_kind.setdefault(one.kind, []).append(one)
    with _lock:
        for kind, found in by_kind.items():
            _last[kind] = call = object()
            threading.Thread(target=_in_turn, args=(call, found), name="sluice-compile").start()


def _in_turn(call: object, found: list[Wanted]) -> None:
    with _turns:
        _compile(call, found)


def _compile(call: object, found: list[Wanted]) -> None:
    if _last[found[0].kind] is call:
        time.sleep(QUIET)
    for one in found:
        if _last[one.kind] is not call:
            return
        parts = [(slice(start, stop), rank) for start, stop, rank in one.parts]
        try:
            dispatch.compile_with_products(one.ggml_type, one.shape, one.dtype, parts, one.device)
        except Exception as error:  # Triton raises anything
            log.debug("a kernel for a LoRA on %s could not be compiled ahead: %s", one.ggml_type.name, error)
            return
