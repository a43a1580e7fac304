"""Other patches on a loaded model, without loading it again.

When the patches of a loaded model change (another LoRA, another strength, none), the host takes the model off the
device and loads it anew, because it may have to undo what it wrote into weights. Functions of quantised weights are
not in the weights: they are exchanged on the layers. What the host did write, into the few plain weights and biases
that an adapter also changes, is undone and done again one weight at a time. Then the host finds the model as it
wants it.

What is left to the host: parts of the model that stay in host memory and weights in the dynamic patcher's pages whose
own patches changed, weights of another shape, another compute type, and functions of other packs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .patch_at_use import PatchAtUse
from .quant.layout import is_gguf

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loaded:
    """What a patcher had put on the model when it was loaded, but for our functions."""

    settings: tuple  # compared by identity
    patches: dict[str, list]  # what the host applied, by weight

    @staticmethod
    def by(patcher: Any) -> Loaded:
        functions = [f for found in patcher.weight_wrapper_patches.values() for f in found]
        foreign = (f for f in functions if not isinstance(f, PatchAtUse))
        settings = (patcher.force_cast_weights, patcher.object_patches.get("manual_cast_dtype"), *foreign)
        return Loaded(settings, {name: list(found) for name, found in patcher.patches.items()})

    def changed(self, wanted: Loaded) -> list[str] | None:
        """The weights whose patches by the host differ; None where more than that does."""
        if not _same(self.settings, wanted.settings):
            return None
        names = {**self.patches, **wanted.patches}
        return [name for name in names if not _same(self.patches.get(name, ()), wanted.patches.get(name, ()))]


def exchange(patcher: Any, loaded: Loaded, device: torch.device) -> bool:
    """Put the patches of `patcher` on its model, which was loaded with others.

    Returns:
        False where only loading it again will do; nothing was done then.
    """
    changed = loaded.changed(Loaded.by(patcher))
    if changed is None or (changed and (patcher.is_dynamic() or patcher.model.model_lowvram)):
        return False
    originals = {name: patcher.backup[name].weight for name in changed if name in patcher.backup}
    if any(is_gguf(originals.get(name, _parameter(patcher.model, name))) for name in changed):
        return False  # only a patch that reshapes it is the host's
    for name in changed:
        owner, _, own_name = name.rpartition(".")
        layer = patcher.model.get_submodule(owner)
        if patcher.backup.pop(name, None) is not None:
            setattr(layer, own_name, torch.nn.Parameter(originals[name], requires_grad=False))
        patcher.patch_weight_to_device(name, device_to=device)
        layer.to(device)
    _exchange_functions(patcher, device)
    return True


def _exchange_functions(patcher: Any, device: torch.device) -> None:
    wanted = {f for found in patcher.weight_wrapper_patches.values() for f in found if isinstance(f, PatchAtUse)}
    change = 0
    for name, layer in patcher.model.named_modules():
        there = getattr(layer, "weight_function", ())
        functions = patcher.weight_wrapper_patches.get(f"{name}.weight", [])
        if not there and not functions:
            continue
        ours = {f for f in there if isinstance(f, PatchAtUse)}
        change -= sum(f.move_to(CPU) for f in ours - wanted)
        layer.weight_function = [*(f for f in there if f not in ours and f not in functions), *functions]
        change += sum(f.move_to(device) for f in functions if isinstance(f, PatchAtUse) and f not in ours)
    if not patcher.is_dynamic():  # which counts no functions
        patcher.model.model_loaded_weight_memory += change


def _parameter(model: torch.nn.Module, name: str) -> Any:
    owner, _, own_name = name.rpartition(".")
    return getattr(model.get_submodule(owner), own_name)


def _same(one: Any, other: Any) -> bool:
    """Whether both hold the same objects; equality of what holds tensors would be a tensor."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
