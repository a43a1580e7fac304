"""Unified memory on a MODEL or CLIP: the host's classic patcher, with weights that are used where the file is mapped.

`use_in_place` changes what three of the host's verbs mean for the quantised weights of a GGUF model (and for plain
ones that are in the file as the model wants them):

    load              they are shown to the layers through a `Window` on their mapping; the host copies the rest
    partially_unload  there is next to nothing to give, and the host unloads the model
    unpatch_model     they go home, and the window is closed: nothing is registered any more

Patches on them are applied at use, as everywhere (`loaders.patcher`). A plain weight that is to be patched by the host
is copied, as without all this, and so is everything where no rung of the ladder works. Nothing is kept of a model that
is not loaded, so that Release Memory can close its file.

Block Swap and this exclude each other, for what is in place need not stream: a model that a Block Swap Config was
given for streams.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..loaders.diffusion import ATTACHMENT
from ..loaders.ops import MappedLayer
from ..loaders.patcher import PatchingAtUse, patching_class
from ..loaders.quant import dispatch, reference
from ..loaders.quant.layout import is_gguf
from ..loaders.sizes import size
from .location import located
from .slots import Slot, slots_of
from .unified import IN_PLACE, Window, facts_of, ladder, mode, open_window

log = logging.getLogger("sluice.offload")


@dataclass
class InPlace:
    """What of a network is used in place, and why, or why nothing is. Clones of a patcher share it with the network."""

    expected_bytes: int  # that the next load will use in place
    reason: str = "the model is not loaded"
    window: Window | None = None
    slots: list[Slot] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of the weights that are used in place now."""
        window = self.window  # the report asks from another thread
        return window.nbytes if window is not None else 0


def in_place_of(patcher: ModelPatcher) -> InPlace | None:
    """Of a patcher that `use_in_place` was called with, or a clone of it."""
    return patcher.model.__dict__.get(IN_PLACE)


def wanted(device: torch.device | None = None) -> tuple[bool, str]:
    """Whether a model that is loaded now should be given to `use_in_place`, and why."""
    device = comfy.model_management.get_torch_device() if device is None else device
    found = ladder(facts_of(device), mode())
    return bool(found.rungs), found.reason


def in_place_if_wanted(patcher: ModelPatcher) -> ModelPatcher:
    """`patcher` itself, from now on with weights in place if the user wants that and its device can do it."""
    ours = patcher.get_attachment(ATTACHMENT) is not None and not patcher.is_dynamic()
    return use_in_place(patcher) if ours and wanted(patcher.load_device)[0] else patcher


def use_in_place(patcher: ModelPatcher) -> ModelPatcher:
    """`patcher` itself, just made and of the host's classic kind, from now on with weights in place.

    Raises:
        ValueError: it is of the dynamic kind, which copies weights in any case.
    """
    if patcher.is_dynamic():
        raise ValueError("unified memory needs a model of the classic kind: load it with disable_dynamic")
    slots = candidates(patcher.model, set())
    patcher.model.__dict__[IN_PLACE] = InPlace(sum(slot.nbytes for slot in slots))
    patcher.__class__ = _in_place_class(type(patcher))  # type: ignore[assignment, arg-type]
    init = patcher.cached_patcher_init  # how the host makes another one, for a second GPU for instance
    if init is not None:
        patcher.cached_patcher_init = (_loaded_again, (init,))
    return patcher


def _loaded_again(init: tuple, disable_dynamic: bool = True) -> ModelPatcher:
    loaded = init[0](*init[1], disable_dynamic=True)
    return use_in_place(loaded[init[2]] if len(init) > 2 else loaded)


class InPlacePatcher(PatchingAtUse):
    """Mixed in before the host's classic patcher."""

    def model_size(self) -> int:
        """What the host has to find room for."""
        state = in_place_of(self)
        return super().model_size() - (state.expected_bytes if state is not None else 0)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        clone = super().clone(*args, **kwargs)
        clone.size = self.size  # the host gave it what `model_size` says, from which the clone would subtract again
        return clone

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        device = torch.device(self.load_device if device_to is None else device_to)
        state = in_place_of(self)
        if state is None or not self._show(state, device):
            super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)
            return
        super().load(device_to, 1e32, force_patch_weights, full_load=True)
        # To the host, a model without a byte on the device is one that is not loaded.
        self.model.model_loaded_weight_memory = max(1, self.model.model_loaded_weight_memory)

    def _show(self, state: InPlace, device: torch.device) -> bool:
        """Show the layers what can be used in place; whether anything can."""
        if state.window is not None and state.window.device != device:
            self._go_home(state)
        if state.window is None:
            self.unpatch_hooks()
            self._before_loading(device)
            self._open(state, device)
        for slot in state.slots:
            slot.show(slot.over(state.window.of(slot.stored)))  # type: ignore[union-attr]
        return state.window is not None

    def _open(self, state: InPlace, device: torch.device) -> None:
        state.expected_bytes = 0
        if self.offload_device.type != "cpu":
            state.reason = "ComfyUI was started so that models stay in VRAM, where they are faster"
            return
        slots = candidates(self.model, set(self.patches))
        if not slots:
            state.reason = "no weight lies in a file as the model computes with it"
            return
        smallest = min((slot for slot in slots if is_gguf(slot.home)), key=lambda slot: slot.nbytes, default=None)
        state.window, state.reason = open_window(
            device, [slot.stored for slot in slots], lambda window: _misread(window, smallest)
        )
        state.slots, state.expected_bytes = slots if state.window is not None else [], state.nbytes
        name = type(self.model).__name__
        if state.window is None:
            log.warning(
                "%s: weights are copied to the GPU instead of used in place (unified memory): %s", name, state.reason
            )
        else:
            log.info("%s: %s of weights are used in place, %s", name, size(state.nbytes), state.reason)

    def _go_home(self, state: InPlace) -> None:
        for slot in state.slots:
            slot.go_home()
            slot.forget()
        if state.window is not None:
            state.window.close()
        state.window, state.slots, state.reason = None, [], "the model is not loaded"

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> float:
        state = in_place_of(self)
        if state is not None and state.window is not None:
            return 0
        return super().partially_unload(device_to, memory_to_free, force_patch_weights)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        state = in_place_of(self)
        leaves = state is not None and state.window is not None and unpatch_weights and device_to is not None
        if leaves:
            for slot in state.slots:  # type: ignore[union-attr]
                slot.go_home()  # so that the host finds nothing to bring back
        super().unpatch_model(device_to, unpatch_weights)
        if leaves:
            self._go_home(state)  # type: ignore[arg-type]

    def _own_memory(self, key: str) -> None:
        state = in_place_of(self)
        weight = comfy.utils.get_attr(self.model, key)
        if state is not None and any(slot.shown is weight for slot in state.slots):
            comfy.utils.set_attr_param(self.model, key, weight.detach().clone())  # the host writes over it
        else:
            super()._own_memory(key)


def candidates(network: torch.nn.Module, patched: set[str]) -> list[Slot]:
    """The weights at home that a layer could use as they are: in a file, and as it computes with them."""
    theirs = {id(weight) for key, weight in network.named_parameters() if key in patched} if patched else ()
    return [
        slot
        for slot in slots_of(network.modules())
        if slot.streams and id(slot.home) not in theirs and located(slot.stored) is not None and _as_computed(slot)
    ]


def _as_computed(slot: Slot) -> bool:
    if is_gguf(slot.home):
        return all(isinstance(module, MappedLayer) for module, _ in slot.owners)
    return all(isinstance(m, MappedLayer) and m.compute_dtype == slot.home.dtype for m, _ in slot.owners)


def _misread(window: Window, slot: Slot | None) -> str | None:
    """Have the device dequantise one weight through the window, and compare with the CPU; what is wrong, or None."""
    if slot is None:
        return None
    weight: Any = slot.home
    params, shape = weight._params, tuple(weight.shape)
    expected = reference.dequantize(slot.stored, params.ggml_type, shape, torch.float32)
    try:
        found = dispatch.dequantize(window.of(slot.stored), params.ggml_type, shape, torch.float32).cpu()
    except (RuntimeError, ValueError) as error:  # Triton's launcher refuses an address with the latter
        return f"the device does not read it ({error})".split("\n")[0]
    same = torch.equal(found.view(torch.int32), expected.view(torch.int32))
    return None if same else "the device reads other bytes than the CPU"


@cache
def _in_place_class(base: type) -> type:
    return type(f"InPlace{base.__name__}", (InPlacePatcher, patching_class(base)), {})


def state_of(patcher: Any) -> dict[str, Any]:
    """For the report: mode, bytes that are used in place, and the reason for both."""
    state = in_place_of(patcher)
    if state is None:
        _, why = wanted(patcher.load_device)
        return {"mode": mode(), "bytes": 0, "rung": None, "reason": why}
    window = state.window
    rung = window.rung if window is not None else None
    return {"mode": mode(), "bytes": state.nbytes, "rung": rung, "reason": state.reason}
