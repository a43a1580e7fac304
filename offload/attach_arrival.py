"""A GGUF model that the host loads whole comes to the GPU through its file's locked pages, as one that streams does.

The host moves a network module by module, and the driver copies each weight through a small buffer of its own, at a
tenth of what the link can do. So before the host loads a model for which there is room, its weights are brought
(`arrival`), and the host finds them there. Everything else stays the host's: a model that does not fit, its plain
weights that are to be patched, biases and norms, and the way back, on which mapped weights go home without a copy.

Where their pages are locked already, the weights are still on their way while the host does all that. So nothing of it
may wait for the device: what is small goes behind them in one copy, and the host is told what it need not patch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..loaders import compat
from ..loaders.diffusion import ATTACHMENT
from ..loaders.ops import MappedLayer
from ..loaders.patcher import PatchingAtUse, check_files, patching_class
from ..loaders.progress import watched
from .ahead import sendable
from .arrival import OnTheWay, send
from .asking import asked_for, asking
from .attach_unified import candidates
from .device import Device, device_for
from .errors import RefusedError, SourceError, StreamError
from .kept import kept_for, left
from .location import located
from .pack import Pack, can_pack
from .slots import Slot, slots_of
from .streamed_patcher import residency_of
from .unified import IN_PLACE

log = logging.getLogger("sluice.offload")

# On a network:
AHEAD = "_sluice_ahead"  # what was sent before the host asked for it
SMALL = "_sluice_small"  # the small weights that were brought in one pack, and what came of each
BUFFERS = 4  # times the largest weight is more than the host keeps free for weights that it does not load


def arriving(patcher: ModelPatcher) -> ModelPatcher:
    """`patcher` itself, from now on loaded this way where it can be: one of ours, of the host's classic kind."""
    if patcher.get_attachment(ATTACHMENT) is not None and not patcher.is_dynamic():
        patcher.__class__ = _arriving_class(type(patcher))  # type: ignore[assignment, arg-type]
    return patcher


@dataclass
class _Ahead:
    """What was sent before the host asked for it."""

    slots: list[Slot] = field(default_factory=list)
    ways: list[OnTheWay] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)

    def close(self) -> None:
        while self.ways:
            self.ways.pop().close()

    def go_home(self) -> None:
        self.close()
        for slot in self.slots:
            for layer, name in slot.owners:
                layer.set_home(name, slot.home)  # type: ignore[operator]
            slot.go_home()
            slot.forget()
        self.slots = []


class ArrivingPatcher(PatchingAtUse):
    """Mixed in before the host's classic patcher."""

    @property
    def _ahead(self) -> _Ahead:
        return self.model.__dict__.setdefault(AHEAD, _Ahead())

    def model_size(self) -> int:
        """To the host that makes room for it, what it is still to be given (`asking`)."""
        return asked_for(self.model, super().model_size())

    @property
    def sent_bytes(self) -> int:
        """That `send_ahead` has sent, and the host knows nothing of."""
        return self._ahead.nbytes

    def send_ahead(self, room: int, most: int = 1 << 62) -> int:
        """Before the host is asked for it: weights whose pages are locked, if all of the model has room; bytes.

        Args:
            room: VRAM that nobody needs as things are.
            most: bytes, as long as others have to leave; `recall` if the host is not asked after all.
        """
        kept, in_place = kept_for(self), IN_PLACE in self.model.__dict__
        if kept is None or in_place or self.model.current_weight_patches_uuid is not None:
            return 0
        if (slots := self._candidates(self.load_device, room + self._ahead.nbytes)) is None:
            return 0
        if not all(weight.file is not None and kept.holds(weight) for weight in (s.weight(located) for s in slots)):
            return 0  # to lock the rest meanwhile would take longer
        chosen = sendable(slots, located, kept, min(room, most))
        if not chosen:
            return 0
        try:
            way = send(chosen, device_for(self.load_device), lambda slot: None, located, True, watched, kept)
        except (torch.OutOfMemoryError, StreamError, RefusedError) as error:
            log.debug("nothing is sent ahead: %s", error)
            return 0
        _show(chosen, way)
        self._ahead.slots += chosen
        self._ahead.ways.append(way)
        return sum(slot.nbytes for slot in chosen)

    def recall(self) -> None:
        """The host did not load it: what was sent ahead goes home."""
        if self.model.current_weight_patches_uuid is None:
            self._ahead.go_home()

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> Any:
        with asking(self.model, None):
            # The host has counted what is there already as taken.
            return super().partially_load(device_to, extra_memory + self._ahead.nbytes, force_patch_weights)

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        try:
            if residency_of(self) is None:  # which brings what stays itself
                device = torch.device(self.load_device if device_to is None else device_to)
                self._send(device, float("inf") if full_load else lowvram_model_memory)
            super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)
            for way in self._ahead.ways:
                way.wait()
        except BaseException:
            self._ahead.close()  # before the memory is let go of
            self.detach()
            raise
        finally:
            self.model.__dict__.pop(AHEAD, None)

    def _candidates(self, device: torch.device, budget: float) -> list[Slot] | None:
        """Everything that is at home and may go as it is, if the host is going to load the whole model."""
        if not compat.may_pin_memory() or device_for(device).registrar.read_only_refusal():
            return None
        slots = candidates(self.model, set(self.patches))
        largest = max((slot.nbytes for slot in (*slots, *self._ahead.slots)), default=None)
        if largest is None or self.model_size() + BUFFERS * largest > budget:
            return None
        names = {layer: name for name, layer in self.model.named_modules()}
        return sorted(slots, key=lambda s: (s.nbytes, names[s.owners[0][0]]))  # as the host unloads a part of them

    def _send(self, device: torch.device, budget: float) -> None:
        """The rest of what `send_ahead` began."""
        ahead = self._ahead
        slots = self._candidates(device, budget)
        if slots is None or device != self.load_device:
            ahead.go_home()
        if slots is None:
            return
        try:
            check_files(self.model)
            there = device_for(device)
            small, others = _sorted(self._small_layers([*slots, *ahead.slots]), there)
            for layer in others:
                layer.to(device)  # first: each of these copies would wait for all of the large ones
            if slots:
                way = send(slots, there, lambda slot: None, located, True, watched, kept_for(self))
                ahead.ways.append(way)
                _show(slots, way)
                ahead.slots += slots
            if small:
                pack = Pack([slot.as_moved(_cast(slot)) for slot in small], there)
                ahead.ways.append(OnTheWay([], [pack]))
                self.model.__dict__[SMALL] = [
                    (slot, _shown(slot, slot.over_moved(data))) for slot, data in zip(small, pack.arrived, strict=True)
                ]
        except SourceError as error:
            ahead.go_home()
            check_files(self.model)
            log.debug("the host loads %s: %s", type(self.model).__name__, error)  # moved, and still sound where mapped

    def _small_layers(self, slots: list[Slot]) -> list[torch.nn.Module]:
        """The layers without any of `slots`. The host is told that these and the others are not to be patched, where
        that is so: it would wait for the device after each."""
        ours = {layer for slot in slots for layer, _ in slot.owners}
        patched = {key.rpartition(".")[0] for key in (*self.patches, *self.pinned)}
        found = []
        for name, layer in self.model.named_modules():
            if layer._modules or name in patched or not layer._parameters:
                continue
            if layer not in ours:
                found.append(layer)
            compat.leave_unpatched(layer)
        return found

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        if device_to is not None and unpatch_weights:
            self.unpatch_hooks()  # which writes into what is there, and must not into the file
            for slot, there in self.model.__dict__.pop(SMALL, ()):
                for layer, name in slot.owners:  # else the host would copy each back, and wait
                    if layer._parameters[name] is there and not isinstance(layer, MappedLayer):
                        layer._parameters[name] = slot.home
        super().unpatch_model(device_to, unpatch_weights)
        if device_to is not None and unpatch_weights:
            left(self.model)


def _show(slots: list[Slot], way: OnTheWay) -> None:
    for slot, parameter in zip(slots, way.parameters, strict=True):
        for layer, name in slot.owners:
            layer.show_away(name, parameter)  # type: ignore[operator]


def _sorted(layers: list[torch.nn.Module], device: Device) -> tuple[list[Slot], list[torch.nn.Module]]:
    """The weights that can go in one pack, where to move a layer is no more than to copy them; and the other layers."""
    plain = [layer for layer in layers if not layer._buffers and all(_is_plain(layer, n) for n in layer._parameters)]
    slots = slots_of(plain)
    if not can_pack(device, [slot.nbytes for slot in slots]):
        return [], layers
    return slots, [layer for layer in layers if layer not in set(plain)]


def _is_plain(layer: torch.nn.Module, name: str) -> bool:
    parameter = layer._parameters[name]
    if parameter is None or parameter.device.type != "cpu":
        return parameter is None
    return layer.is_home(name) if isinstance(layer, MappedLayer) else type(parameter.data) is torch.Tensor


def _cast(slot: Slot) -> torch.dtype | None:
    """What a small weight becomes on a device, as a layer of ours moves it."""
    layer, name = slot.owners[0]
    return layer.compute_dtype if isinstance(layer, MappedLayer) and name == "bias" else None


def _shown(slot: Slot, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    for layer, name in slot.owners:
        if isinstance(layer, MappedLayer):
            layer.show_away(name, parameter)
        else:
            layer._parameters[name] = parameter
    return parameter


@cache
def _arriving_class(base: type) -> type:
    return type(f"Arriving{base.__name__}", (ArrivingPatcher, patching_class(base)), {})
