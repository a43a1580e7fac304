"""An adapter onto a MODEL and a CLIP: names by ComfyUI's maps, patches by the model's own patcher.

A patcher of this pack's loaders turns patches of quantised weights into functions of them; any other does what it
does for ComfyUI's own LoRA node. What matched nothing is counted and told, for a LoRA of another model changes
pictures little enough to go unnoticed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch

from ..loaders.named_tensors import named_tensors
from . import keys
from .fit import fits
from .garbage import put_off
from .read import AdapterFile, LoraError

log = logging.getLogger("sluice.lora")

ATTACHMENT = "sluice_loras"
SHOWN = 3  # names in a message


@runtime_checkable
class PatchesByWay(Protocol):
    """A patcher that lets one choose how LoRAs on quantised weights are computed."""

    def add_patches_by(self, way: str, patches: dict, strength: float) -> list: ...

    def expect_rank(self, rank: int) -> None: ...


@dataclass(frozen=True)
class AppliedLora:
    """What a model remembers of a LoRA on it (attachment `sluice_loras`, a tuple of these); the report shows it."""

    name: str
    strength: float
    way: str
    weights: int
    nbytes: int


@dataclass(frozen=True)
class Applied:
    """The patched model and text encoder, and what did not fit: names of tensors in the file."""

    model: Any
    clip: Any
    weights: int
    unmatched: tuple[str, ...]
    tensors: int

    @property
    def warning(self) -> str:
        """One sentence for log and node; empty when all is well."""
        if not self.unmatched:
            return ""
        first = ", ".join(self.unmatched[:SHOWN]) + (", ..." if len(self.unmatched) > SHOWN else "")
        return (
            f"{len(self.unmatched)} of {self.tensors} tensors of this LoRA match nothing in the model and were left "
            f"out ({first}); it may be made for another model"
        )


@put_off()
def apply(
    adapter: AdapterFile, model: Any, clip: Any, strength_model: float, strength_clip: float, way: str = "auto"
) -> Applied:
    """Clones of `model` and `clip` (either may be None) with the adapter on them.

    A strength of 0 leaves its part as it is.

    Raises:
        LoraError: nothing in the adapter matches, or it lacks one of a pair of tensors.
    """
    networks = {
        **({"model": _Network.of(model.model, comfy.lora.model_lora_keys_unet)} if model is not None else {}),
        **({"clip": _Network.of(clip.cond_stage_model, comfy.lora.model_lora_keys_clip)} if clip is not None else {}),
    }
    names = {name: target for network in networks.values() for name, target in network.keys.items()}
    tensors = _Watched(keys.with_known_prefix(comfy.lora_convert.convert_lora(adapter.tensors), names.keys()))
    try:
        patches = comfy.lora.load_lora(tensors, keys.concerned(names, tensors), log_missing=False)
    except KeyError as error:
        raise LoraError(adapter.path, f"tensor {error} is missing", "it is incomplete, download it again") from error
    placed: set[Any] = set()
    parts = {"model": (model, strength_model), "clip": (clip.patcher if clip is not None else None, strength_clip)}
    results: dict[str, Any] = {"model": model, "clip": clip}
    count = 0
    for part, (patcher, strength) in parts.items():
        if patcher is None:
            continue
        shapes = networks[part].shapes
        own = {target: patch for target, patch in patches.items() if _weight_name(target) in shapes}
        fitting = {t: patch for t, patch in own.items() if fits(patch, t, shapes[_weight_name(t)])}
        placed |= fitting.keys()
        count += len(fitting)
        if fitting and strength != 0:
            results[part] = _patched(results[part], fitting, strength, way, adapter)
    unmatched = tuple(_unmatched(tensors, names, placed, clip is not None))
    if count == 0:
        raise _nothing_fits(adapter, model, unmatched)
    applied = Applied(results["model"], results["clip"], count, unmatched, len(tensors))
    log.info("%s: %d weights, %.1f MB, %s", adapter.path.name, count, adapter.nbytes / 1e6, way)
    if applied.warning:
        log.warning("%s: %s", adapter.path.name, applied.warning)
    return applied


def expect_rank(model: Any, rank: int) -> None:
    """An adapter of `rank` for `model` is being read; its kernels may be compiled meanwhile."""
    if isinstance(model, PatchesByWay):
        model.expect_rank(rank)


@dataclass(frozen=True)
class _Network:
    """What is asked of a network for every LoRA, found out once: it takes longer than all the rest of applying one."""

    shapes: dict[str, tuple[int, ...]]
    keys: dict[str, Any]  # the host's: names in adapters -> what they are patches of

    @staticmethod
    def of(network: torch.nn.Module, host_keys: Callable[[torch.nn.Module, dict], dict]) -> _Network:
        # A state dict would wrap every quantised weight anew.
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(network, buffers=True)}
        known = _known.get(network)
        if known is None or known.shapes != shapes:
            known = _known[network] = _Network(shapes, host_keys(network, {}))
        return known


_known: WeakKeyDictionary[torch.nn.Module, _Network] = WeakKeyDictionary()


class _Watched(dict):
    """Tensors by name that remembers which of them somebody has taken."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.taken: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.taken.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.taken.add(name)
        return super().get(name, default)


def _patched(owner: Any, patches: dict, strength: float, way: str, adapter: AdapterFile) -> Any:
    """A clone of a MODEL or CLIP with the patches on it."""
    clone = owner.clone()
    patcher = getattr(clone, "patcher", clone)  # a CLIP's, or the MODEL itself
    if isinstance(patcher, PatchesByWay):
        patcher.add_patches_by(way, patches, strength)
    else:
        patcher.add_patches(patches, strength)
    if adapter.metadata:
        patcher.set_attachments("lora_metadata", adapter.metadata)  # as ComfyUI's own node does
    applied = AppliedLora(adapter.path.name, strength, way, len(patches), adapter.nbytes)
    patcher.set_attachments(ATTACHMENT, (*(patcher.get_attachment(ATTACHMENT) or ()), applied))
    return clone


def _weight_name(target: Any) -> str:
    return target if isinstance(target, str) else target[0]


def _unmatched(tensors: _Watched, names: dict[str, Any], placed: set, with_clip: bool) -> Iterator[str]:
    """The tensors that nothing took, or that go where the model has nothing of their shape; those for a text encoder
    count only where one is connected."""
    for name in tensors:
        stem, ending = keys.split(name)
        if name not in tensors.taken:
            if with_clip or not keys.is_for_text_encoder(name):
                yield name
        elif stem in names and _destination(names[stem], ending) not in placed:
            yield name


def _destination(target: Any, ending: str) -> Any:
    """What `load_lora` makes a tensor a patch of; parts of fused weights have no biases."""
    return f"{target[: -len('.weight')]}.bias" if ending in keys.OF_THE_BIAS else target


def _nothing_fits(adapter: AdapterFile, model: Any, unmatched: tuple[str, ...]) -> LoraError:
    if not unmatched:
        problem = "it changes a text encoder only" if adapter.tensors else "it holds no tensors"
        return LoraError(adapter.path, problem, "connect a CLIP to the node, or choose another LoRA")
    kind = type(model.model.model_config).__name__ if model is not None else "this text encoder"
    first = ", ".join(name[:100] for name in unmatched[:SHOWN])
    return LoraError(
        adapter.path,
        f"none of its {len(adapter.tensors)} tensors match a weight of {kind}, in name and shape (they begin with "
        f"{first})",
        "choose a LoRA that was made for this model, or another model",
    )
