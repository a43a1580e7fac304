"""The host's classic patcher for a network whose weights stream: what four of its verbs mean then.

The host goes on doing what it does: it decides what this model may have (`load_models_gpu`), patches resident weights,
and asks for room when another model needs it. Answered differently are

    load              the budget becomes a plan; what stays is brought to the device, the ring is opened
    partially_load    nothing at all if nothing changed, and nothing of the weights if only LoRAs did
    partially_unload  the same with a smaller budget
    unpatch_model     weights go home, instead of being copied back into RAM

Patches on streamed weights are applied at use, as the host does with weights that it leaves in RAM.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import cache
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..loaders import compat
from ..loaders.exchange import Loaded, exchange
from ..loaders.ops import MappedLayer
from ..loaders.patcher import check_files, patching_class
from ..loaders.progress import watched
from ..loaders.uploads import uploading
from .ahead import HEAD_START_BYTES
from .asking import asked_for
from .attach_adapters import StreamingAdapters
from .errors import RefusedError, StreamError
from .kept import kept_for, left
from .location import located
from .plan import BudgetTooSmallError
from .residency import Residency
from .terms import Foreseen, Terms

log = logging.getLogger("sluice.offload")

UNLIMITED = 1 << 62  # bytes


def residency_of(model: ModelPatcher) -> Residency | None:
    """Where a MODEL's weights are, if Block Swap is attached to it."""
    return getattr(model.model, "_sluice_residency", None)


class StreamedPatcher(StreamingAdapters):
    """Mixed in before the host's classic patcher."""

    @property
    def _residency(self) -> Residency:
        return self.model._sluice_residency

    def model_size(self) -> int:
        """To the host that makes room for it, what it is to be given (`asking`)."""
        return asked_for(self.model, super().model_size())

    @property
    def sent_bytes(self) -> int:
        """That `send_ahead` has sent, while the host has not asked."""
        return int(self.model.model_loaded_weight_memory) if self.model.current_weight_patches_uuid is None else 0

    def send_ahead(self, room: int, most: int = UNLIMITED) -> int:
        """Before the host is asked for it: weights that stay, as far as that can be known, on their way; bytes.

        Args:
            room: VRAM that nobody needs as things are.
            most: bytes, as long as others have to leave; `recall` if the host is not asked after all.
        """
        plan, sent = self._residency.plan, int(self.model.model_loaded_weight_memory)
        if plan is None or self.model.current_weight_patches_uuid is not None:
            return 0
        # `_budget` leaves what the user says instead.
        reserved = comfy.model_management.extra_reserved_memory()
        if plan.vram_bytes + self.adapter_bytes > room + sent + reserved:
            most = min(most, HEAD_START_BYTES - sent)  # there will be another plan
        try:
            nbytes = self._residency.send_ahead(self.load_device, self._terms(0, 0), min(room, most))
        except (torch.OutOfMemoryError, StreamError, RefusedError) as error:
            log.debug("nothing is sent ahead: %s", error)
            return 0
        self.model.model_loaded_weight_memory += nbytes  # so that the host counts them as free or there
        return nbytes

    def recall(self) -> None:
        """The host did not load it: what was sent ahead goes home."""
        if self.model.current_weight_patches_uuid is None and not self._residency.arranged:
            self._residency.leave()
            self.model.model_loaded_weight_memory = 0

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        device = torch.device(self.load_device if device_to is None else device_to)
        self._load_within(device, *self._budget(device, UNLIMITED if full_load else lowvram_model_memory))

    def _load_within(self, device: torch.device, budget: int, most: int, foreseen: Foreseen | None = None) -> None:
        check_files(self.model)
        with self.use_ejected():
            self.unpatch_hooks()
            if foreseen is not None:
                self._residency.arrange(self.model, device, self._terms(budget, most), foreseen)
            else:
                arrange = self._residency.arrange
                self.beside_adapters(device, lambda: arrange(self.model, device, self._terms(budget, most)))
            with self.adapters_at_home():
                self._patch_streamed(device)
                # Saving reads the weights one by one and patches them then: the host need not force patches on them.
                super().load(device, lowvram_model_memory=1e32, force_patch_weights=False, full_load=False)
            self._residency.adopt()
            self._residency.settle()
            self._residency.close_file()
            self.model.model_lowvram = True  # so that the host undoes what was done to the layers' functions
            self.model.model_loaded_weight_memory = self._residency.vram_bytes + self.adapter_bytes

    def _load_list(self, *args: Any, **kwargs: Any) -> list:
        """The host's own loading goes over what is resident, all of it."""
        streamed = self._residency.streamed_modules()
        everything = super()._load_list(*args, **kwargs)
        resident = [entry for entry in everything if entry[-2] not in streamed]
        for *_, name, module, parameters in resident:
            if self.patches.keys().isdisjoint(f"{name}.{own}" for own in parameters):
                compat.leave_unpatched(module)
        return resident

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> float:
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            current = self.model.current_weight_patches_uuid
            used = self.model.model_loaded_weight_memory
            changed = current is not None and current != self.patches_uuid
            if changed and self._exchange_adapters(device_to, used + extra_memory):
                return self.model.model_loaded_weight_memory - used
            if current is not None and not changed and self.adapters_made_room:
                budget, _ = self._budget(device_to, used + extra_memory)
                changed = self._residency.could_fit(budget - self._adapters().nbytes)  # they need not any more
            self._residency.unfollow()
            if changed:
                self.keep_adapters()
            self.unpatch_model(None, unpatch_weights=changed)  # nothing leaves the device for that
            self.patch_model(load_weights=False)
            budget, most = self._budget(device_to, used + extra_memory)
            foreseen = None
            if current is not None and not changed:
                with suppress(BudgetTooSmallError):  # the LoRAs can make room, or else loading says so
                    foreseen = self._residency.foresee(device_to, self._terms(budget, most))
                if foreseen is not None and foreseen.kept:
                    self.apply_hooks(self.forced_hooks, force_apply=True)
                    return 0
                self.unpatch_model(None, unpatch_weights=True)
                self.patch_model(load_weights=False)
            try:
                self._load_within(device_to, budget, most, foreseen)
            except BaseException:
                self.detach()
                raise
            return self.model.model_loaded_weight_memory - used

    def _exchange_adapters(self, device: torch.device, allowed: float) -> bool:
        """Put other LoRAs on the loaded model, where they differ by nothing but functions and have room beside the plan
        that there is. False where it has to be loaded anew; nothing was done then."""
        loaded = self.model.__dict__.get("_sluice_loaded")
        if loaded is None or self.adapters_made_room or loaded.changed(Loaded.by(self)) != []:
            return False
        terms = self._terms(*self._budget(device, allowed))
        try:
            foreseen = self._residency.foresee(device, terms)
        except BudgetTooSmallError:  # they have to stream, or loading says so
            return False
        if foreseen is None or not foreseen.kept:
            return False
        try:
            self._residency.unfollow()
            self.unpatch_hooks()
            self.unpatch_model(None, unpatch_weights=False)
            self.patch_model(load_weights=False)
            self._residency.arrange(self.model, device, terms, foreseen)
            with uploading(device, compat.may_pin_memory()):
                exchange(self, loaded, device)
            self.model.__dict__["_sluice_loaded"] = Loaded.by(self)
            self.model.current_weight_patches_uuid = self.patches_uuid
            self.apply_hooks(self.forced_hooks, force_apply=True)
        except BaseException:
            self.detach()
            raise
        return True

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> float:
        """Another model needs room: fewer weights stay. Frees nothing where the smallest plan would still be too
        large, and the host then unloads the model."""
        used = self.model.model_loaded_weight_memory
        budget = int(used - memory_to_free)
        if not self._residency.could_fit(budget - self.least_adapter_bytes):
            return 0
        with self.use_ejected():
            self.unpatch_hooks()
            self.unpatch_model(None, unpatch_weights=True)
            self.patch_model(load_weights=False)
            try:
                self._load_within(self.load_device, budget, budget)
            except (OSError, RuntimeError, ValueError) as error:
                name = type(self.model).__name__
                # The weights' file is gone, for instance. That is no business of the model that needs the room.
                log.warning("%s cannot give up a part of its memory, so it gives up all: %s", name, error)
                return 0
            except BaseException:  # the user cancelled
                self.detach()
                raise
        return used - self.model.model_loaded_weight_memory

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            for module in self.model.modules():
                compat.move_functions(module, self.offload_device)
        super().unpatch_model(None, unpatch_weights)
        if unpatch_weights:
            self._residency.disown()
            self.model.model_loaded_weight_memory = self._residency.vram_bytes
        if device_to is not None and unpatch_weights:
            self.keep_adapters()
            self._residency.leave()
            if self._residency.at_home:
                self.model.to(device_to)  # what is not ours: object patches that brought weights of their own
            self.model.device = device_to
            self.model.model_loaded_weight_memory = 0
            left(self.model)

    def _read_ahead(self, device: torch.device) -> None: ...  # the residency does, for what it needs

    def _hooked_at_use(self, key: str) -> bool:
        module, _, name = key.rpartition(".")
        layer = comfy.utils.get_attr(self.model, module)
        streams = name == "weight" and layer in self._residency.streamed_modules() and hasattr(layer, "weight_function")
        return streams or super()._hooked_at_use(key)

    # The host locks weights that it leaves in RAM; ours are locked by their source.

    def pin_weight_to_device(self, key: str) -> None: ...

    def unpin_weight(self, key: str) -> None: ...

    def unpin_all_weights(self) -> None: ...

    def _budget(self, device: torch.device, allowed: float) -> tuple[int, int]:
        """Bytes for weights and ring, of the `allowed` that the host gives; and the most that there is."""
        request = self._residency.request
        if device.type == "cpu":
            return request.budget(int(min(allowed, UNLIMITED)), 0), request.budget(UNLIMITED, 0)
        free = comfy.model_management.get_free_memory(device) + self.model.model_loaded_weight_memory
        # The host has taken its own reserve off; the user's dial takes its place.
        available = min(allowed + comfy.model_management.extra_reserved_memory(), free)
        return request.budget(int(available), 0), request.budget(int(free), 0)

    def _terms(self, budget: int, most: int) -> Terms:
        names = (key.rpartition(".") for key in self.patches)
        patched = {(id(comfy.utils.get_attr(self.model, module)), name) for module, _, name in names}
        adapters, choice = self.budgeted_adapter_bytes, self._residency.choice
        own = choice.source.pinned_bytes if choice else 0  # let go before another source is chosen
        return Terms(
            budget_bytes=max(0, budget - adapters),
            most_bytes=max(0, most - adapters),
            pinned_budget_bytes=compat.pinned_memory_left() + own,
            may_pin=compat.may_pin_memory(),
            located=located,
            dtype_of=_declared_dtype,
            account_pinned=compat.account_pinned,
            patched_by_host=lambda slot: any((id(module), name) in patched for module, name in slot.owners),
            watch=watched,
            kept=kept_for(self),
        )

    def _patch_streamed(self, device: torch.device) -> None:
        """Patches on streamed weights run at each use."""
        names = {module: name for name, module in self.model.named_modules()}
        for module in self._residency.streamed_modules():
            for kind in ("weight", "bias"):
                key = f"{names[module]}.{kind}"
                functions = [compat.patch_at_use(key, self.patches)] if key in self.patches else []
                functions += self.weight_wrapper_patches.get(key, [])
                if hasattr(module, f"{kind}_function"):
                    setattr(module, f"{kind}_function", functions)
                elif functions:
                    raise ValueError(
                        f"Block Swap: {key} streams and has a patch (a LoRA, for instance), but its layer, a "
                        f"{type(module).__name__}, is none that ComfyUI could patch at use. Remove the patch, or "
                        "Block Swap, or raise vram_budget_gb until all weights stay"
                    )
            compat.cast_at_use(module, self.force_cast_weights, isinstance(module, torch.nn.Embedding))
            compat.move_functions(module, device)


def _declared_dtype(module: torch.nn.Module, name: str) -> torch.dtype | None:
    """What a plain tensor becomes on a device. The host's layers may have been given a file's tensor as it was."""
    if isinstance(module, MappedLayer):
        return module.compute_dtype if name == "bias" else None
    return compat.model_dtype(module, name)


@cache
def streamed_class(base: type) -> type:
    return type(f"Streamed{base.__name__}", (StreamedPatcher, patching_class(base)), {})
