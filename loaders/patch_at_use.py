"""Patches as a function of the dense weight, which the host's layers run at each use (`weight_function`)."""

from __future__ import annotations

import copy
from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter import WeightAdapterBase


class PatchAtUse:
    """Patches for one weight, computed with the host's own arithmetic.

    The adapters' tensors stay where the file reader put them, in host memory, and are copied to a device when the
    host moves the layer's functions there (`move_to`). Clones of a model hold the same objects and so one copy.

    Args:
        key: the weight's name in the model.
        patches: the host's (strength, adapter, strength_model, offset, function), in the order of application.
        originals: the unpatched weights by name, in the host's form; patches that are differences of models need it.
    """

    def __init__(self, key: str, patches: list[tuple], originals: dict | None = None) -> None:
        self.key = key
        self.patches = patches
        self.originals = originals
        self._moved: dict[torch.device, list[tuple]] = {}

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        patches = self._moved.get(weight.device, self.patches)
        return comfy.lora.calculate_weight(
            patches, weight, self.key, intermediate_dtype=weight.dtype, original_weights=self.originals
        )

    @property
    def nbytes(self) -> int:
        """What a copy on another device takes."""
        return sum(_nbytes(patch[1]) for patch in self.patches)

    def move_to(self, device: torch.device) -> int:
        """Copy the adapters to `device` unless they are there, or on the way home drop the copies.

        Returns:
            The bytes that now lie on `device`, or for the CPU those that were let go: what the host adds to the
            model's memory when it loads a layer, and to what it has freed when it unloads one.
        """
        if device.type == "cpu":
            freed = self.nbytes * len(self._moved)
            self._moved = {}
            return freed
        if device not in self._moved:
            self._moved[device] = [(patch[0], _to(patch[1], device), *patch[2:]) for patch in self.patches]
        return self.nbytes


def _is_model(value: Any) -> bool:
    """Whether a patch is another model's weight (a merge, a model as a LoRA), which stays where it is: the device must
    not hold two models because a node merged them."""
    named = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)
    return isinstance(value, list) or (named and value[0] == "model_as_lora")


def _to(value: Any, device: torch.device) -> Any:
    if _is_model(value):
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, WeightAdapterBase):
        moved = copy.copy(value)
        moved.weights = _to(value.weights, device)
        return moved
    return value


def _nbytes(value: Any) -> int:
    if _is_model(value):
        return 0
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, WeightAdapterBase):
        return _nbytes(value.weights)
    return sum(map(_nbytes, value)) if isinstance(value, tuple) else 0
