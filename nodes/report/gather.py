"""The report: where the bytes of every loaded model are and what that costs, as one JSON object (docs/report.md).

The route, the websocket event, the Memory Report node and the live view all show what `report` returns. It reads what
others know already, from whichever thread asks, and takes no lock that a running model takes. Only the sizes of files
are asked for, with little patience (`answers`), because the event loop is among the threads that ask.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ...loaders import compat
from ...loaders.diffusion import ATTACHMENT, LoadedModel
from ...loaders.patch_at_use import PatchAtUse
from ...loaders.quant import dispatch
from ...lora.apply import ATTACHMENT as LORAS
from ...offload.attach_unified import in_place_of
from ...offload.attach_unified import state_of as in_place_state
from ...offload.events import Event, recent_events
from ...offload.report import SwapState, state_of
from ...offload.streamed_patcher import residency_of
from ..apply_lora import CACHE
from . import memory
from .answers import NO_ANSWER, FileLooks, Found
from .blocks import HostBlocks

VERSION = 1  # of the object; a field that changes its meaning raises it
# What only a model of this kind has.
KINDS = {"diffusion_model": "diffusion_model", "encode_token_weights": "text_encoder", "decode": "vae"}

HOST_BLOCKS = HostBlocks()
FILE_LOOKS = FileLooks()


def report(prompt: dict | None, timeline: dict) -> dict:
    """The whole object. Bytes are integers, times are milliseconds, nothing is NaN.

    Args:
        prompt: how far the running prompt is.
        timeline: `Timeline.data()`.
    """
    now = time.time()  # before anything is waited for
    patchers = list(_loaded())
    looks = FILE_LOOKS.at(path for patcher in patchers for path in _files(patcher))
    return {
        "version": VERSION,
        "time_ms": round(now * 1e3),
        "prompt": prompt,
        "models": [model_report(patcher, looks) for patcher in patchers],
        "host_ram": memory.host_ram(),
        "vram": memory.vram(),
        "caches": _caches(),
        "dispatch": [{"what": what, "choice": why} for what, why in dispatch.choices().items()],
        "events": [_event(event) for event in recent_events()],
        "timeline": timeline,
    }


def _event(event: Event) -> dict:
    fields = asdict(event)
    return {"time_ms": round(fields.pop("time") * 1e3), **fields}


def _loaded() -> Iterable[Any]:
    """The models that the host counts as loaded, the last used first."""
    entries = list(comfy.model_management.current_loaded_models)
    return [patcher for patcher in (entry.model for entry in entries) if patcher is not None]


def model_report(patcher: Any, looks: Mapping[Path, Found]) -> dict:
    """Of one MODEL, CLIP's or VAE's patcher, given what is known of its files."""
    loaded = patcher.get_attachment(ATTACHMENT)
    residency = residency_of(patcher)
    swap = state_of(residency) if residency is not None else None
    paths = _files(patcher)
    class_name = type(patcher.model).__name__
    return {
        "name": paths[0].name if paths else class_name,
        "kind": next((kind for mark, kind in KINDS.items() if hasattr(patcher.model, mark)), "other"),
        "class": class_name,
        "files": [_file(path, looks.get(path, NO_ANSWER)) for path in paths],
        "architecture": loaded.architecture if loaded is not None else None,
        "quant_types": _quant_types(_sources(patcher)),
        "device": str(patcher.load_device),
        "managed_by": "comfyui" if swap is None else "sluice",
        "bytes": _bytes(patcher, swap, loaded is not None),
        **({**_NOT_STREAMED, "blocks": HOST_BLOCKS.of(patcher)} if swap is None else _streamed(swap)),
        "loras": [
            {"name": one.name, "strength": one.strength, "way": one.way, "weights": one.weights, "bytes": one.nbytes}
            for one in patcher.get_attachment(LORAS) or ()
        ],
        "patches": _patches(patcher),
        "unified_memory": in_place_state(patcher) if loaded is not None else None,
    }


_NOT_STREAMED: dict[str, Any] = {
    **dict.fromkeys(("source", "plan", "last_step", "current_block")),
    **{"blocks": [], "passes": 0, "plans_made": 0, "misses": 0},
}


def _streamed(swap: SwapState) -> dict[str, Any]:
    # Each by itself: `asdict` copies what it walks, which takes a third of the whole report's time.
    parts = {name: getattr(swap, name) for name in _NOT_STREAMED}
    described = {name: vars(part).copy() for name, part in parts.items() if is_dataclass(part)}
    return {**parts, **described, "blocks": [vars(block).copy() for block in swap.blocks]}


def _bytes(patcher: Any, swap: SwapState | None, gguf: bool) -> dict[str, int]:
    """Of the weights, and how they divide: on the device, copied there at each pass, in their file only, in RAM.

    `ring` is what streamed weights pass through on the device, and belongs to none of them.
    """
    resident = swap.resident_bytes if swap is not None else int(patcher.loaded_size())
    streamed = swap.streamed_bytes if swap is not None else 0
    in_place = in_place_of(patcher)  # what the patcher does not count
    total = max(int(patcher.model_size()), resident + streamed) + (in_place.nbytes if in_place is not None else 0)
    elsewhere = total - resident - streamed
    in_file = elsewhere if elsewhere and (gguf or _lies_in_a_file(patcher.model)) else 0
    return {
        "total": total,
        "resident": resident,
        "streamed": streamed,
        "on_disk": in_file,
        "in_ram": elsewhere - in_file,
        "ring": swap.ring_bytes if swap is not None else 0,
    }


def _lies_in_a_file(network: torch.nn.Module) -> bool:
    """Whether the weights are mapped from their file, by the first of them: they come from one loader."""
    first = next((weight for weight in network.parameters() if weight.dim() > 1), None)
    stored = getattr(first, "_qdata", first)  # of a quantised one
    return stored is not None and stored.device.type == "cpu" and compat.file_slice(stored) is not None


def _sources(patcher: Any) -> list[LoadedModel]:
    """The GGUF files that it was loaded from."""
    loaded = patcher.get_attachment(ATTACHMENT)
    return [loaded, *getattr(loaded, "others", ())] if loaded is not None else []


def _files(patcher: Any) -> list[Path]:
    return [one.file.path for one in _sources(patcher)] or _paths(patcher.cached_patcher_init)


def _file(path: Path, found: Found) -> dict[str, Any]:
    return {"name": path.name, "bytes": found.nbytes, "state": found.state}


def _quant_types(files: list[LoadedModel]) -> dict[str, int]:
    """Bytes of each type in the files."""
    sizes: dict[str, int] = {}
    for file in files:
        for name, nbytes in file.tensor_types.items():
            sizes[name] = sizes.get(name, 0) + nbytes
    return sizes


def _paths(init: Any) -> list[Path]:
    """The files that the host would make a model from again: the first argument of whoever made it."""
    first = init[1][0] if init is not None and init[1] else None
    if isinstance(first, tuple):  # the way that Block Swap wrapped
        return _paths(first)
    return [Path(path) for path in (first if isinstance(first, list) else [first]) if isinstance(path, (str, Path))]


def _patches(patcher: Any) -> dict[str, int]:
    """Weights that patches change: at each use by us, or written into the weight by the host."""
    at_use = [function for functions in list(patcher.weight_wrapper_patches.values()) for function in functions]
    ours = [function for function in at_use if isinstance(function, PatchAtUse)]
    return {
        "at_use": len(ours),
        "by_comfyui": len(patcher.patches),
        "bytes": sum(function.nbytes for function in ours),
    }


def _caches() -> list[dict[str, int | str | None]]:
    """What is kept to be used again; None where there is no such number."""
    loras = CACHE.state()
    return [
        {
            "name": "loras",
            "bytes": loras.nbytes,
            "bound_bytes": loras.bound_bytes,
            "entries": loras.files,
            "hits": loras.hits,
            "misses": loras.misses,
        },
        {
            "name": "kernels",
            "bytes": None,
            "bound_bytes": None,
            "entries": dispatch.kept_kernels(),
            "hits": None,
            "misses": None,
        },
    ]
