"""Patches (LoRA and everything the host adds through `add_patches`) on quantised weights.

The host patches a resident weight by replacing it with a dense copy, and under dynamic VRAM by quantising the
patched weight again; the first doubles memory and the second changes the model between step one and step two. So
patches for a quantised weight become *weight wrappers*, which both of the host's patchers run on the dequantised
weight at each use, with the host's own arithmetic. Everything else goes the host's way.

The host clones a patcher as its own class, or as the plain one; the wrappers survive both.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher

from .quant.layout import is_gguf


class PatchAtUse:
    """The patches of one `add_patches` call for one weight.

    Args:
        key: the weight's name in the model.
        patch: the host's (strength, adapter, strength_model, offset, function).
    """

    def __init__(self, key: str, patch: tuple) -> None:
        self.key = key
        self.patch = patch

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return comfy.lora.calculate_weight([self.patch], weight, self.key, intermediate_dtype=weight.dtype)


class PatchingAtUse(ModelPatcher):
    """Mixed in before the host's patcher class."""

    def add_patches(self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        quantised: dict = {}
        others: dict = {}
        weights = dict(self.model.named_parameters())
        for key, adapter in patches.items():
            name = key if isinstance(key, str) else key[0]
            (quantised if is_gguf(weights.get(name)) else others)[key] = adapter
        accepted = super().add_patches(others, strength_patch, strength_model)
        for key, adapter in quantised.items():
            name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
            patch = (strength_patch, adapter, strength_model, offset, function)
            self.add_weight_wrapper(name, PatchAtUse(name, patch))
        return [*accepted, *quantised]


@cache
def _patching_class(base: type) -> type:
    return type(f"Sluice{base.__name__}", (PatchingAtUse, base), {})


def patching_at_use(patcher: ModelPatcher) -> Any:
    """The same model under a patcher that never replaces a quantised weight."""
    return _patching_class(type(patcher))(  # type: ignore[arg-type]
        patcher.model, load_device=patcher.load_device, offload_device=patcher.offload_device
    )
