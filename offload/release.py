"""Give memory back now: Release Memory's two ways.

    offload   a model's VRAM, and the RAM that was locked for it; the next use loads it from RAM or from its file
    dispose   also the RAM: a GGUF model's weights are put away and its file is closed (`shelf`); the next use opens it

A disposed network knows how to become whole (`loaders.patcher.RESTORE`), and does so before the host loads it, saves it
or copies it.

Cancel is looked for between two models. Within one there is nothing to wait for: weights are not copied home, because
their homes were never left, and a mapping is given back in one call.

Weights that were read into RAM, as from safetensors, cannot be put away: they stay until their node's output goes, and
the log says so, also of a part of a model.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ..loaders.diffusion import ATTACHMENT
from ..loaders.gguf.reader import GGUFFile
from ..loaders.patcher import RESTORE, PatchingAtUse, living
from ..loaders.progress import watched
from ..loaders.sizes import size
from ..loaders.tensors import reopened
from .attach_stages import forget_estimates
from .events import record
from .files import StoredFile
from .kept import give_back
from .location import located
from .seats import part_of, patchers_that_left, unload
from .shelf import Shelf
from .slots import Slot, slots_of
from .stages import ALL, CACHES, HOW, WHAT, Part
from .streamed_patcher import residency_of

log = logging.getLogger("sluice.offload")

_WORTH_SAYING = 1 << 20  # bytes; norms and biases are less


def release(what: str, how: str) -> int:
    """Release `what` (a key of `WHAT`) by `how`; bytes of VRAM that models gave back.

    Raises:
        ValueError: a word that is not among these.
    """
    for word, words in ((what, tuple(WHAT)), (how, HOW)):
        if word not in words:
            raise ValueError(f"Release Memory: {word!r} is none of {', '.join(words)}.")
    freed = 0
    if what != CACHES:
        freed = _release_models(_models(WHAT[what], how), how)
        for patcher in living():  # of one that was never loaded, RAM may be locked ahead
            if WHAT[what] in (None, part_of(patcher)):
                give_back(patcher.model)
    if what in (CACHES, ALL):
        _release_caches()
    comfy.model_management.soft_empty_cache()
    if how == "dispose":
        _trim()
    return freed


def _trim() -> None:
    """Have the C library give the system back what was freed between other allocations: a hundred megabytes after a
    picture, which it keeps otherwise. That is glibc's; others keep less."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _models(part: Part | None, how: str) -> list[ModelPatcher]:
    """What the host has loaded, or an Offload Mode node has moved out, of `part` or at all; to dispose of, also GGUF
    models that the host has not loaded, whose files are open all the same. One patcher per network."""
    found: dict[int, ModelPatcher] = {}
    for patcher in (*_loaded(), *patchers_that_left(), *(living() if how == "dispose" else [])):
        if part is None or part_of(patcher) is part:
            found.setdefault(id(patcher.model), patcher)
    return list(found.values())


def _loaded() -> list[ModelPatcher]:
    return [entry.model for entry in comfy.model_management.current_loaded_models if entry.model is not None]


def _release_models(patchers: Sequence[ModelPatcher], how: str) -> int:
    """The bytes of VRAM that they gave back. The user may cancel between two of them."""
    done: list[tuple[ModelPatcher, int, Callable[[], str]]] = []  # with what closes the file and says so
    loaded = {id(patcher.model) for patcher in _loaded()}
    try:
        with watched("releasing memory", sum(patcher.model_size() for patcher in patchers)) as told:
            for patcher in patchers:
                nbytes = unload(patcher)
                give_back(patcher.model)  # of one that had left for a stage
                done.append((patcher, nbytes, _dispose(patcher) if how == "dispose" else lambda: ""))
                told(patcher.model_size())
    finally:
        for patcher, nbytes, outcome in done:  # not before: one file may have several models
            action = "leaves" if id(patcher.model) in loaded else "is released"
            why = ": ".join(filter(None, ("Release Memory", outcome())))
            record(action, type(patcher.model).__name__, nbytes, why, logged=True)
    return sum(nbytes for _, nbytes, _ in done)


def _release_caches() -> None:
    forget_estimates()
    gc.collect()
    comfy.model_management.reset_cast_buffers()
    comfy.model_management.soft_empty_cache(True)
    record("released", CACHES, 0, "Release Memory", logged=True)


# --- dispose


def _dispose(patcher: ModelPatcher) -> Callable[[], str]:
    """Put the weights of an unloaded model away; what this returns says what came of it, for the log."""
    loaded = patcher.get_attachment(ATTACHMENT)
    if loaded is None or not isinstance(patcher, PatchingAtUse):
        stay = f"its {size(patcher.model_size())} {_STAYING}"
        return lambda: stay
    if RESTORE in patcher.model.__dict__:
        return lambda: "its file is closed already"
    opened = [one.file for one in (loaded, *getattr(loaded, "others", ()))]
    slots, shelf = _slots(patcher), Shelf(_Files(opened))
    for slot in slots:
        slot.forget()
    shelf.empty(slots, partial(_located_in, {str(part) for file in opened for part in file.parts}))
    patcher.model.__dict__[RESTORE] = shelf.bring_back
    staying = sum(slot.nbytes for slot in slots if slot.home.device.type != "meta")
    also = f"; {size(staying)} {_STAYING}" if staying >= _WORTH_SAYING else ""
    return lambda: (
        (
            "its file is closed"
            if shelf.close()
            else "its file stays mapped for now, because another MODEL or CLIP uses the same weights"
        )
        + also
    )


_STAYING = (
    "stay in RAM, because they were not mapped from GGUF; they go when the output of the node that loaded them does"
)


def _slots(patcher: ModelPatcher) -> list[Slot]:
    residency = residency_of(patcher)
    inside = residency.inside() if residency is not None else []
    homes = {id(slot.home) for slot in inside}
    return [*inside, *(slot for slot in slots_of(patcher.model.modules()) if id(slot.home) not in homes)]


def _located_in(paths: set[str], tensor: torch.Tensor) -> tuple[StoredFile, int] | None:
    found = located(tensor)
    return found if found is not None and str(found[0].path) in paths else None


class _Files:
    """The GGUF files of a model, for its shelf."""

    def __init__(self, files: Sequence[GGUFFile]) -> None:
        self._files = files

    def close(self) -> bool:
        closed = [file.close() for file in self._files]  # every one of them, also after one that stays mapped
        return all(closed)

    def reopen(self) -> Callable[[StoredFile, int], torch.Tensor]:
        data: dict[Any, Callable] = {}
        for file in self._files:
            data.update(dict.fromkeys(map(str, file.parts), reopened(file)))
        return lambda stored, offset: data[str(stored.path)](stored.path, offset)
