"""A GGUF model that the host loads whole comes to the GPU through its file's locked pages, as one that streams does.

The host moves a network module by module, and the driver copies each weight through a small buffer of its own, at a
tenth of what the link can do. So before the host loads a model for which there is room, its weights are brought
(`arrival`), and the host finds them there. Everything else stays the host's: a model that does not fit, its plain
weights that are to be patched, biases and norms, and the way back, on which mapped weights go home without a copy.

Where their pages are locked already, the weights are still on their way while the host does all that. So nothing of it
may wait for the device: what is small is moved before they are sent, and the host is told what it need not patch.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from comfy.model_patcher import ModelPatcher

from ..loaders import compat
from ..loaders.diffusion import ATTACHMENT
from ..loaders.patcher import PatchingAtUse, check_files, patching_class
from ..loaders.progress import watched
from .arrival import OnTheWay, send
from .attach_unified import candidates
from .device import device_for
from .errors import SourceError
from .kept import kept_for, left
from .location import located
from .slots import Slot
from .streamed_patcher import residency_of

log = logging.getLogger("sluice.offload")

BUFFERS = 4  # times the largest weight is more than the host keeps free for weights that it does not load


def arriving(patcher: ModelPatcher) -> ModelPatcher:
    """`patcher` itself, from now on loaded this way where it can be: one of ours, of the host's classic kind."""
    if patcher.get_attachment(ATTACHMENT) is not None and not patcher.is_dynamic():
        patcher.__class__ = _arriving_class(type(patcher))  # type: ignore[assignment, arg-type]
    return patcher


class ArrivingPatcher(PatchingAtUse):
    """Mixed in before the host's classic patcher."""

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        way = None
        if residency_of(self) is None:  # which brings what stays itself
            device = torch.device(self.load_device if device_to is None else device_to)
            way = self._send(device, float("inf") if full_load else lowvram_model_memory)
        try:
            super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)
            if way is not None:
                way.wait()
        except BaseException:
            if way is not None:
                way.close()  # before the memory is let go of
                self.detach()
            raise

    def _send(self, device: torch.device, budget: float) -> OnTheWay | None:
        """Everything that is at home and may go as it is, if the host is going to load the whole model."""
        there = device_for(device)
        if not compat.may_pin_memory() or there.registrar.read_only_refusal():
            return None
        slots = candidates(self.model, set(self.patches))
        if not slots or self.model_size() + BUFFERS * max(slot.nbytes for slot in slots) > budget:
            return None
        names = {layer: name for name, layer in self.model.named_modules()}
        slots.sort(key=lambda slot: (slot.nbytes, names[slot.owners[0][0]]))  # as the host unloads a part of them
        try:
            check_files(self.model)
            self._move_others(device, names, slots)
            way = send(slots, there, lambda slot: None, located, True, watched, kept_for(self))
        except SourceError as error:
            check_files(self.model)
            log.debug("the host loads %s: %s", type(self.model).__name__, error)  # moved, and still sound where mapped
            return None
        except BaseException:
            self.detach()
            raise
        for slot, parameter in zip(slots, way.parameters, strict=True):
            for layer, name in slot.owners:
                layer.show_away(name, parameter)  # type: ignore[operator]
        return way

    def _move_others(self, device: torch.device, names: dict[torch.nn.Module, str], slots: list[Slot]) -> None:
        """Move the layers without any of `slots` to where the host would; it is told that these and the others are not
        to be patched, where that is so. A small copy that is enqueued behind the large ones would wait for them all."""
        ours = {layer for slot in slots for layer, _ in slot.owners}
        patched = {key.rpartition(".")[0] for key in (*self.patches, *self.pinned)}
        for layer, name in names.items():
            if layer._modules or name in patched or not layer._parameters:
                continue
            if layer not in ours:
                layer.to(device)
            compat.leave_unpatched(layer)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        if device_to is not None and unpatch_weights:
            left(self.model)


@cache
def _arriving_class(base: type) -> type:
    return type(f"Arriving{base.__name__}", (ArrivingPatcher, patching_class(base)), {})
