"""Give memory back now: Release Memory's two ways, for what the host has loaded.

    offload   a model's VRAM, and the RAM that was locked for it; the next use loads it from RAM or from its file
    dispose   also the RAM: a GGUF model's weights are put away and its file is closed (`shelf`); the next use opens it

A disposed network knows how to become whole (`loaders.patcher.RESTORE`), and does so before the host loads it, saves it
or copies it. Weights that a loader of the host read into RAM cannot be put away: they stay until their node's output
goes, and the log says so.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ..loaders.diffusion import ATTACHMENT
from ..loaders.gguf.reader import GGUFFile
from ..loaders.patcher import RESTORE, PatchingAtUse
from ..loaders.tensors import reopened
from .attach import located, residency_of
from .attach_stages import forget_estimates
from .events import record
from .files import StoredFile
from .seats import part_of, patchers_that_left, unload
from .shelf import Shelf
from .slots import Slot, slots_of
from .stages import GB, Part

log = logging.getLogger("sluice.offload")

CACHES = "caches"
ALL = "all"
WHAT: dict[str, Part | None] = {
    "text_encoder": Part.TEXT,
    "diffusion_model": Part.DIFFUSION,
    CACHES: None,
    ALL: None,
}
HOW = ("offload", "dispose")


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
        freed = sum(_release_model(patcher, how) for patcher in _models(WHAT[what]))
    if what in (CACHES, ALL):
        _release_caches()
    comfy.model_management.soft_empty_cache()
    return freed


def _models(part: Part | None) -> list[ModelPatcher]:
    """What the host has loaded, or an Offload Mode node has moved out, of `part` or at all; one patcher per network."""
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models if entry.model is not None]
    found: dict[int, ModelPatcher] = {}
    for patcher in (*loaded, *patchers_that_left()):
        if part is None or part_of(patcher) is part:
            found.setdefault(id(patcher.model), patcher)
    return list(found.values())


def _release_model(patcher: ModelPatcher, how: str) -> int:
    name = type(patcher.model).__name__
    nbytes = unload(patcher)
    why = "Release Memory"
    if how == "dispose":
        why = f"Release Memory: {_dispose(patcher)}"
    record("leaves", name, nbytes, why, logged=True)
    return nbytes


def _release_caches() -> None:
    forget_estimates()
    gc.collect()
    comfy.model_management.reset_cast_buffers()
    comfy.model_management.soft_empty_cache(True)
    record("released", CACHES, 0, "Release Memory", logged=True)


# --- dispose


def _dispose(patcher: ModelPatcher) -> str:
    """Put the weights of an unloaded model away; what came of it, for the log."""
    loaded = patcher.get_attachment(ATTACHMENT)
    if loaded is None or not isinstance(patcher, PatchingAtUse):
        return (
            f"its {patcher.model_size() / GB:.2f} GB stay in RAM, because its loader is not of this pack; they go when "
            "the node that loaded it does"
        )
    if RESTORE in patcher.model.__dict__:
        return "its file is closed already"
    files = [one.file for one in (loaded, *getattr(loaded, "others", ()))]
    slots = _slots(patcher)
    for slot in slots:
        slot.forget()
    shelf = Shelf(_Files(files))
    closed = shelf.put_away(slots, partial(_located_in, {str(part) for file in files for part in file.parts}))
    patcher.model.__dict__[RESTORE] = shelf.bring_back
    if closed:
        return "its file is closed"
    return "its file stays mapped for now, because another MODEL or CLIP uses the same weights"


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
