"""Patches (LoRA and everything the host adds through `add_patches` and hooks) on quantised weights.

The host patches a resident weight by replacing it with a dense copy, and under dynamic VRAM by quantising the
patched weight again; the first doubles memory and the second changes the model between step one and step two. So
patches for a quantised weight become *weight wrappers*, which both of the host's patchers run on the dequantised
weight at each use, with the host's own arithmetic. Everything else goes the host's way, and so does a patch that
gives a weight another shape, because only a replaced weight can have one.

What the host does with its own record of patches (merge two models, save one, schedule a LoRA by hooks) is answered
here from the wrappers.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterable
from functools import cache, partial
from math import prod
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from . import compat
from .cold_weights import read_weights_ahead
from .exchange import Loaded, exchange
from .gguf.reader import GGUFFile
from .gguf.types import GGMLType
from .named_tensors import named_tensors
from .ops import MappedLayer
from .patch_at_use import LowRankAtUse, PatchAtUse, joined, of_network, patch_at_use
from .quant.early import COMMON_RANKS, LONGEST, Wanted, busy, compile_soon, compile_when_idle, done
from .quant.layout import dense, is_gguf
from .saving import LazyWeight
from .uploads import uploading

CPU = torch.device("cpu")
_CHECK = "_sluice_check"  # on a network: the function that looks at its files
_living: weakref.WeakSet[ModelPatcher] = weakref.WeakSet()
RESTORE = "_sluice_restore"  # on a network whose weights were put away: the function that brings them back


def restore(network: torch.nn.Module) -> None:
    """Make a network whole whose weights were put away, before anybody looks at them.

    Raises:
        GGUFError: their file was changed meanwhile; the network stays as it is.
    """
    if RESTORE in network.__dict__:
        network.__dict__[RESTORE]()
        del network.__dict__[RESTORE]


def check_files_of(network: torch.nn.Module, files: Iterable[GGUFFile]) -> None:
    """Have every load of `network` begin with a look at the files that its weights are mapped from."""
    opened = tuple(files)

    def check() -> None:  # a function, which copies of the network share
        for file in opened:
            file.check_unchanged()

    network.__dict__[_CHECK] = check


def check_files(network: torch.nn.Module) -> None:
    """Before weights are touched: to read where a mapped file was cut off ends the process.

    Raises:
        GGUFError: a file was changed since it was loaded.
    """
    if check := network.__dict__.get(_CHECK):
        check()


class PatchingAtUse(ModelPatcher):
    """Mixed in before the host's patcher class."""

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        clone = super().clone(*args, **kwargs)
        if not isinstance(clone, PatchingAtUse):
            # The host names its plain class where it leaves dynamic VRAM for a clone (hooks, `disable_dynamic`). The
            # clone is finished, shares its backups with others and detaches the model when it dies, so it cannot be
            # made once more as ours; it has no state that the mixin lacks.
            clone.__class__ = patching_class(type(clone))  # type: ignore[arg-type]
        _living.add(clone)
        return clone

    # --- patches

    def add_patches(self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        return self._add(patches, strength_patch, strength_model, "auto")

    def add_patches_by(self, way: str, patches: dict, strength: float) -> list:
        """`add_patches` with a choice for LoRAs on quantised weights: one of `low_rank.WAYS`."""
        return self._add(patches, strength, 1.0, way)

    def _add(self, patches: dict, strength_patch: float, strength_model: float, way: str) -> list:
        weights = dict(named_tensors(self.model))
        accepted, others, patched = [], {}, {}
        for key, adapter in patches.items():
            name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
            patch = (strength_patch, adapter, strength_model, offset, function)
            weight = weights.get(name)
            if not is_gguf(weight) or name in self.patches or self._reshapes(patch, weight, name):
                others[key] = adapter
            else:
                added = patch_at_use(name, [patch], tuple(weight.shape), weight.dtype, way)
                self.weight_wrapper_patches[name] = joined(self.weight_wrapper_patches.get(name, []), added)
                patched[name] = weight
                accepted.append(key)
        last = ((f, weight) for name, weight in patched.items() for f in self._wrapped(name)[-1:])
        compile_soon({wanted for f, weight in last if (wanted := f.wanted(weight, self.load_device))})
        if not others:
            self.patches_uuid = uuid.uuid4()  # all that the host would do, but for wrapping every weight anew
            return accepted
        return [*super().add_patches(others, strength_patch, strength_model), *accepted]

    def expect_rank(self, rank: int) -> None:
        """A LoRA is about to be added that has `rank` on most weights: it is being read."""
        compile_soon(self._kernels_for(rank))

    def pre_run(self) -> None:
        busy(LONGEST)
        super().pre_run()

    def cleanup(self) -> None:
        """What the host calls when a run has ended."""
        super().cleanup()
        done()
        if self.load_device.type == "cuda" and "_sluice_ran" not in self.model.__dict__:
            self.model.__dict__["_sluice_ran"] = True
            compile_when_idle(wanted for rank in COMMON_RANKS for wanted in self._kernels_for(rank, beside=False))

    def _kernels_for(self, rank: int, beside: bool = True) -> list[Wanted]:
        """What a LoRA of `rank` on all matrices, `beside` those that there are, would need for most of them."""
        matrices = [(n, w) for n, w in named_tensors(self.model) if is_gguf(w) and len(w._params.orig_shape) == 2]
        by_type: dict[GGMLType, list[Wanted]] = {}
        for name, weight in matrices:
            params, there = weight._params, self._wrapped(name) if beside else ()
            ranks = rank + sum(function.rank for function in there if isinstance(function, LowRankAtUse))
            rows, columns = params.orig_shape
            wanted = Wanted(self.load_device, params.ggml_type, params.orig_dtype, (rows, columns), ((0, rows, ranks),))
            by_type.setdefault(params.ggml_type, []).append(wanted)
        often = (found for found in by_type.values() if len(found) >= len(matrices) / 10)
        # A kernel serves all shapes but the smallest.
        return [max(found, key=lambda wanted: (wanted.parts[0][2], prod(wanted.shape))) for found in often]

    def _reshapes(self, patch: tuple, weight: torch.Tensor, name: str) -> bool:
        """Whether the patch changes the weight's shape; then what was added before it goes the host's way, too."""
        if comfy.lora.calculate_shape([patch], weight, name) == weight.shape:
            return False
        if earlier := self._wrapped(name):
            self.patches[name] = [p for wrapper in earlier for p in wrapper.patches]
            foreign = [w for w in self.weight_wrapper_patches[name] if not isinstance(w, PatchAtUse)]
            self.weight_wrapper_patches[name] = foreign
        return True

    def _wrapped(self, name: str) -> list[PatchAtUse]:
        return [w for w in self.weight_wrapper_patches.get(name, ()) if isinstance(w, PatchAtUse)]

    def get_key_patches(self, filter_prefix: str | None = None) -> dict:
        restore(self.model)
        found = super().get_key_patches(filter_prefix)
        for name in found.keys() & self.weight_wrapper_patches.keys():
            found[name] = [*found[name], *(p for wrapper in self._wrapped(name) for p in wrapper.patches)]
        return found

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        if not unpatch_weights:
            return
        self.model.__dict__.pop("_sluice_loaded", None)
        # The host leaves the functions of a layer that was loaded whole, and with them the adapters, until the model
        # is loaded again.
        for layer in self.model.modules():
            if functions := getattr(layer, "weight_function", None):
                for ours in (f for f in functions if isinstance(f, PatchAtUse)):
                    ours.move_to(CPU)
                layer.weight_function = [f for f in functions if not isinstance(f, PatchAtUse)]

    # --- loading

    def model_patches_to(self, device: Any) -> None:
        """What the host calls first when it loads a model, which may be a clone for another GPU: with the device, then
        with the dtype, which a text encoder has not. With a device alone it lets go of a model, without weights."""
        if not isinstance(device, torch.device):
            restore(self.model)
        self.weight_wrapper_patches: dict[str, list] = of_network(self.weight_wrapper_patches, self.model)
        super().model_patches_to(device)

    def load(self, device_to: torch.device | None = None, *args: Any, **kwargs: Any) -> None:
        device = self.load_device if device_to is None else device_to
        busy()
        self._before_loading(device)
        with uploading(device, compat.may_pin_memory()):
            super().load(device_to, *args, **kwargs)
        self.model.__dict__["_sluice_loaded"] = Loaded.by(self)

    def _before_loading(self, device: torch.device) -> None:
        try:
            check_files(self.model)
            self._read_ahead(device)
        except BaseException:
            self.detach()  # as the host does after an error, but not when the user cancels
            raise

    def _read_ahead(self, device: torch.device) -> None:
        """What of the weights is not in the system's cache, unless they are on the device already."""
        if "_sluice_loaded" not in self.model.__dict__:
            read_weights_ahead(self.model, device)

    def pin_weight_to_device(self, key: str) -> None:
        """The host locks what it leaves in RAM, and in the way in which it asks, NVIDIA's driver refuses the mapping of
        a file, which is read-only: a warning in the log for each weight."""
        weight = comfy.utils.get_attr(self.model, key)
        mapped = compat.file_slice(weight._qdata if is_gguf(weight) else weight.detach()) is not None
        if torch.version.hip or not mapped:
            super().pin_weight_to_device(key)

    def partially_load(self, device_to: torch.device, *args: Any, **kwargs: Any) -> Any:
        loaded, current = self.model.__dict__.get("_sluice_loaded"), self.model.current_weight_patches_uuid
        if loaded is not None and current not in (None, self.patches_uuid):
            self.unpatch_hooks()
            try:
                with uploading(device_to, compat.may_pin_memory()):
                    exchanged = exchange(self, loaded, device_to)
            except BaseException:
                self.detach()
                raise
            if exchanged:
                self.model.__dict__["_sluice_loaded"] = Loaded.by(self)
                self.model.current_weight_patches_uuid = self.patches_uuid
        return super().partially_load(device_to, *args, **kwargs)

    # --- hooks: patches that the host puts on and takes off between two evaluations of the model

    @property
    def _hooked(self) -> dict[str, PatchAtUse]:
        """What hooks put on the layers now; clones share the layers, so the model remembers it."""
        return self.model.__dict__.setdefault("_sluice_hooked", {})

    def _hook(self, name: str, function: PatchAtUse) -> None:
        self._unhook(name)
        layer = comfy.utils.get_attr(self.model, name.rpartition(".")[0])
        layer.weight_function = [*layer.weight_function, function]
        self._hooked[name] = function

    def _unhook(self, name: str) -> None:
        function = self._hooked.pop(name, None)
        if function is not None:
            layer = comfy.utils.get_attr(self.model, name.rpartition(".")[0])
            layer.weight_function = [f for f in layer.weight_function if f is not function]

    def patch_hooks(self, hooks: Any) -> None:
        with uploading(self.load_device, compat.may_pin_memory()):
            super().patch_hooks(hooks)

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: dict, key: str, original_weights: dict, memory_counter: Any
    ) -> None:
        if key not in combined_patches:
            return
        if not self._hooked_at_use(key):
            self._own_memory(key)
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
            return
        weight = comfy.utils.get_attr(self.model, key)
        originals = {key: original_weights.pop(key)}
        function = patch_at_use(key, combined_patches[key], tuple(weight.shape), weight.dtype, originals=originals)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = (function, self.load_device)
            if memory_counter.is_useable(function.nbytes):
                memory_counter.decrement(function.move_to(self.load_device))
        self._hook(key, function)

    def patch_cached_hook_weights(self, cached_weights: dict, key: str, memory_counter: Any) -> None:
        function = cached_weights[key][0]
        if isinstance(function, PatchAtUse):
            self._hook(key, function)
        else:
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        for name in [n for n in self._hooked if not whitelist_keys_set or n in whitelist_keys_set]:
            self._unhook(name)
        super().unpatch_hooks(whitelist_keys_set)

    def _hooked_at_use(self, key: str) -> bool:
        """Whether a hook's patches on this weight become a function; the host writes them into others."""
        return is_gguf(comfy.utils.get_attr(self.model, key))

    def _own_memory(self, key: str) -> None:
        """The host writes hooked weights in place, and a plain one may be a view of the file, which is read-only."""
        weight = comfy.utils.get_attr(self.model, key)
        if weight.device.type == "cpu" and key not in self.hook_backup:
            comfy.utils.set_attr_param(self.model, key, weight.detach().clone())

    # --- saving

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict:
        restore(self.model)
        check_files(self.model)
        network = self.model if model is None else model
        tensors = network.state_dict()
        for path, layer in network.named_modules():
            if isinstance(layer, MappedLayer):  # else what is saved would depend on where the model ran before
                tensors.update((f"{path}.{name}", home) for name, home in layer.cast_from().items())
        return {name: self._for_saving(prefix + name, tensor) for name, tensor in tensors.items()}

    def state_dict_for_saving(
        self, clip_state_dict: Any = None, vae_state_dict: Any = None, clip_vision_state_dict: Any = None
    ) -> dict:
        # Hosts before 0.20 do not go through `model_state_dict_for_saving`.
        network = self.model_state_dict_for_saving(self.model.diffusion_model, "diffusion_model.")
        return self.model.state_dict_for_saving(
            network,
            clip_state_dict=clip_state_dict,
            vae_state_dict=vae_state_dict,
            clip_vision_state_dict=clip_vision_state_dict,
        )

    def _for_saving(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        pending = key in self.patches and key not in self.backup  # the host patches at use, too, where memory is short
        if not (is_gguf(tensor) or pending or self._wrapped(key)):
            return tensor
        shape = comfy.lora.calculate_shape(self.patches[key], tensor, key) if pending else tensor.shape
        return LazyWeight(partial(self._saved, key, tensor, pending), shape, tensor.dtype)

    def _saved(self, key: str, tensor: torch.Tensor, pending: bool) -> torch.Tensor:
        """One weight as the model computes with it."""
        weight = tensor
        if pending:
            weight = self.patch_weight_to_device(key, device_to=self.load_device, return_weight=True)
        wrappers = self._wrapped(key)
        weight = dense(weight, tensor.dtype)
        if wrappers and not is_gguf(tensor):
            weight = weight.clone()  # a patch is added in place
        for wrapper in wrappers:
            weight = wrapper(weight)
        return weight.to(tensor.dtype)


@cache
def patching_class(base: type) -> type:
    """`base` with patches at use; itself if it has that already."""
    if issubclass(base, PatchingAtUse):
        return base
    return type(f"Sluice{base.__name__}", (PatchingAtUse, base), {})


def patching_at_use(patcher: ModelPatcher) -> Any:
    """The same model under a patcher that never replaces a quantised weight."""
    made = patching_class(type(patcher))(  # type: ignore[arg-type]
        patcher.model, load_device=patcher.load_device, offload_device=patcher.offload_device
    )
    _living.add(made)
    return made


def patch_at_use_from_now_on(patcher: ModelPatcher) -> None:
    """Make a patcher that is finished one that never replaces a quantised weight; it has no state that ours lack."""
    patcher.__class__ = patching_class(type(patcher))  # type: ignore[assignment, arg-type]
    _living.add(patcher)


def living() -> list[ModelPatcher]:
    """The patchers of GGUF models that somebody has, loaded by the host or not."""
    return list(_living)
