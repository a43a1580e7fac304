"""Block Swap on a MODEL: the host's classic patcher, with residency planned and streamed by us.

`apply_block_swap` gives the model a network of its own over the same weights (`slots.twin`), so that the MODEL it was
made from, and the host's dynamic VRAM on that, stay as they are. The host goes on doing what it does: it decides what
this model may have (`load_models_gpu`), patches resident weights, and asks for room when another model needs it. Four
of its verbs are answered differently:

    load              the budget becomes a plan; what stays is brought to the device, the ring is opened
    partially_load    nothing at all if nothing changed
    partially_unload  the same with a smaller budget
    unpatch_model     weights go home, instead of being copied back into RAM

Patches on streamed weights are applied at use, as the host does with weights that it leaves in RAM.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, PatcherInjection

from ..loaders import compat
from ..loaders.diffusion import ATTACHMENT
from ..loaders.gguf.reader import GGUFFile
from ..loaders.ops import MappedLayer
from ..loaders.patcher import check_files, patching_class, restore
from ..loaders.progress import watched
from ..loaders.tensors import reopened
from .attach_adapters import StreamingAdapters, adapter_stream_of
from .blocks import Block, find_blocks
from .costs import SwapRequest
from .files import StoredFile
from .plan import BudgetTooSmallError
from .residency import Residency
from .shelf import Shelf
from .slots import twin
from .terms import Foreseen, Terms
from .unified import IN_PLACE

log = logging.getLogger("sluice.offload")

KEY = "sluice_block_swap"  # of injection and callbacks
UNLIMITED = 1 << 62  # bytes


def apply_block_swap(model: ModelPatcher, request: SwapRequest) -> ModelPatcher:
    """A clone of `model` whose weights stream as `request` says; `model` itself is left as it is.

    Raises:
        ValueError: the model has no blocks that could stream, or its file is gone.
    """
    _unload(model)
    restore(model.model)
    if (residency := residency_of(model)) is not None and residency.shelf is not None:
        residency.shelf.bring_back()  # if unloading could not, this says why
        residency.shelf = None  # from now on two networks look at the mapping
    network = twin(model.model, compat.dynamic_state(model.model))
    compat.forget_dynamic_state(network)
    network.__dict__.pop(IN_PLACE, None)  # what streams is not used in place
    _cast_where_dtypes_differ(network)
    network.device = model.offload_device
    empty = tuple(type(container)() for container in model.get_clone_model_override()[1])
    clone = model.clone(disable_dynamic=True, model_override=(network, empty))
    # The host takes a clone for a view of its parent's network, and this one has another network.
    clone.parent = None
    clone.clone_base_uuid = uuid.uuid4()
    clone.hook_backup = {}
    clone.is_injected = False
    if others := clone.additional_models.get("multigpu"):  # each is to be a model like this one, for another GPU
        clone.set_additional_models("multigpu", [apply_block_swap(other, request) for other in others])
    return _streamed(clone, request, None)


def default_request(request: SwapRequest) -> SwapRequest | None:
    """What a model gets for which nobody asked for Block Swap: on an NVIDIA GPU `request`, for it is faster at equal
    VRAM than the host's own two ways (benchmarks/results/block_swap_h200.txt); elsewhere nothing was measured, and
    None leaves the model to the host."""
    device = comfy.model_management.get_torch_device()
    return request if device.type == "cuda" and torch.version.cuda else None


def can_stream(model: ModelPatcher) -> bool:
    return bool(_blocks(model))


def stream(model: ModelPatcher, request: SwapRequest) -> ModelPatcher:
    """`model` itself, of the host's classic kind and just made, from now on with streamed weights.

    Raises:
        ValueError: the model has no blocks that could stream.
    """
    loaded = model.get_attachment(ATTACHMENT)
    return _streamed(model, request, Shelf(_File(loaded.file)) if loaded is not None else None)


def _streamed(model: ModelPatcher, request: SwapRequest, shelf: Shelf | None) -> ModelPatcher:
    blocks = _blocks(model)
    if not blocks:
        raise ValueError(
            f"Block Swap: no blocks were found in this model ({type(model.model).__name__}), so nothing can stream; "
            "remove the node, and ComfyUI manages the model's memory as usual"
        )
    model.model._sluice_residency = Residency(blocks, request, shelf)
    init = model.cached_patcher_init  # how the host makes another one, for a second GPU for instance
    if init is not None:
        init = init[1][0] if init[0] is _loaded_again else init
        model.cached_patcher_init = (_loaded_again, (init, request))
    if isinstance(model, StreamedPatcher):
        return model
    model.__class__ = _streamed_class(type(model))  # type: ignore[assignment, arg-type]
    model.set_injections(KEY, [PatcherInjection(inject=_inject, eject=_eject)])
    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, _before_run)
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, _after_run)
    return model


def _blocks(model: ModelPatcher) -> list[Block]:
    """Those that run at every step. To copy the others each time would be for nothing, so they stay."""
    return [block for block in find_blocks(model.model.diffusion_model) if block.every_step]


class _File:
    """The GGUF file of a model, for its shelf."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def close(self) -> bool:
        return self._file.close()

    def reopen(self) -> Callable[[StoredFile, int], torch.Tensor]:
        data = reopened(self._file)
        return lambda stored, offset: data(stored.path, offset)


def residency_of(model: ModelPatcher) -> Residency | None:
    """Where a MODEL's weights are, if Block Swap is attached to it."""
    return getattr(model.model, "_sluice_residency", None)


def _unload(model: ModelPatcher) -> None:
    """Have the host bring the weights home, where both networks find them."""
    loaded = comfy.model_management.current_loaded_models
    for entry in [entry for entry in loaded if entry.model is not None and model.is_clone(entry.model)]:
        entry.model_unload()
        loaded.remove(entry)
    if model.loaded_size():
        model.detach()


def _loaded_again(init: tuple, request: SwapRequest, disable_dynamic: bool = True) -> ModelPatcher:
    """As `cached_patcher_init` of the host: the model from its file. It is of the classic kind in any case."""
    loaded = init[0](*init[1], disable_dynamic=True)
    return stream(loaded[init[2]] if len(init) > 2 else loaded, request)


def _inject(patcher: ModelPatcher) -> None:
    if (residency := residency_of(patcher)) is not None:
        residency.follow(patcher)
    if (adapters := adapter_stream_of(patcher.model)) is not None:
        adapters.follow(patcher)


def _eject(patcher: ModelPatcher) -> None:
    if (residency := residency_of(patcher)) is not None:
        residency.unfollow(patcher)  # a clone that was never loaded may go while another runs
    if (adapters := adapter_stream_of(patcher.model)) is not None:
        adapters.unfollow(patcher)


def _before_run(patcher: ModelPatcher) -> None:
    residency = residency_of(patcher)
    if residency is not None and residency.times is not None:
        residency.times.begin()


def _after_run(patcher: ModelPatcher) -> None:
    residency = residency_of(patcher)
    if residency is not None:
        residency.restore()
        if residency.arranged:  # as another plan may have it, once blocks were measured
            patcher.model.model_loaded_weight_memory = residency.vram_bytes + patcher.adapter_bytes
    if (adapters := adapter_stream_of(patcher.model)) is not None:
        adapters.restore()


class StreamedPatcher(StreamingAdapters):
    """Mixed in before the host's classic patcher."""

    @property
    def _residency(self) -> Residency:
        return self.model._sluice_residency

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
            self._residency.close_file()
            self.model.model_lowvram = True  # so that the host undoes what was done to the layers' functions
            self.model.model_loaded_weight_memory = self._residency.vram_bytes + self.adapter_bytes

    def _load_list(self, *args: Any, **kwargs: Any) -> list:
        """The host's own loading goes over what is resident."""
        streamed = self._residency.streamed_modules()
        everything = super()._load_list(*args, **kwargs)
        return [entry for entry in everything if not any(entry[-2] is module for module in streamed)]

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> float:
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            current = self.model.current_weight_patches_uuid
            used = self.model.model_loaded_weight_memory
            changed = current is not None and current != self.patches_uuid
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


def _cast_where_dtypes_differ(network: torch.nn.Module) -> None:
    for module in network.modules():
        if hasattr(module, "comfy_cast_weights") and not isinstance(module, MappedLayer):
            declared = ((p.dtype, compat.model_dtype(module, n)) for n, p in module.named_parameters(recurse=False))
            if any(dtype != model_dtype for dtype, model_dtype in declared if model_dtype is not None):
                module.comfy_cast_weights = True  # type: ignore[assignment]


def located(tensor: torch.Tensor) -> tuple[StoredFile, int] | None:
    """The file and offset of a tensor's bytes, if the host knows that they lie in one."""
    found = compat.file_slice(tensor)
    if found is None:
        return None
    path, size, mtime_ns, offset = found
    return StoredFile(Path(path), size, mtime_ns), offset


@cache
def _streamed_class(base: type) -> type:
    return type(f"Streamed{base.__name__}", (StreamedPatcher, patching_class(base)), {})
