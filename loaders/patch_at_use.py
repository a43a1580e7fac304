"""Patches as a function of the dense weight, which the host's layers run at each use (`weight_function`).

Every kind of patch is computed by the host's own `calculate_weight`. Those that are plain LoRAs, which nearly all
are, have a shorter way on a GPU (`low_rank.py`), and `ops.py` asks them for it. On a CPU they keep the host's
arithmetic, bit for bit, unless they are told to run beside the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import ref

import comfy.lora
import torch
from comfy.weight_adapter import (
    BOFTAdapter,
    GLoRAAdapter,
    LoHaAdapter,
    LoKrAdapter,
    LoRAAdapter,
    OFTAdapter,
    WeightAdapterBase,
)

from . import low_rank
from .quant.early import Wanted
from .uploads import uploaded

_DORA_SCALE = {LoRAAdapter: 4, LoHaAdapter: 7, LoKrAdapter: 8, GLoRAAdapter: 5}  # where in `weights` it is


class PatchAtUse:
    """Patches for one weight, computed with the host's own arithmetic.

    The adapters' tensors stay where the file reader put them, in host memory, and are copied to a device when the
    host moves the layer's functions there (`move_to`). Clones of a model that share its network hold the same objects
    and so one copy. A clone with a network of its own, which the host makes for a second GPU, loads and unloads by
    itself and gets functions of its own (`of`), for to be moved home says nothing of the device that one leaves.

    A copy may be dropped while kernels still read it. It was allocated on its device's current stream, which waits
    for whatever other stream the host has functions run in before the layer computes; and the allocator gives the
    bytes to nobody but work that comes later on that stream.

    Args:
        key: the weight's name in the model.
        patches: the host's (strength, adapter, strength_model, offset, function), in the order of application.
        originals: the unpatched weights by name, in the host's form; patches that are differences of models need it.
    """

    def __init__(self, key: str, patches: list[tuple], originals: dict | None = None) -> None:
        self.key = key
        self.patches = patches
        self.originals = originals
        self.stays_home = False  # `move_to` makes no copies: they come and go otherwise
        self._moved: dict[torch.device, Any] = {}
        self._by_network: list[tuple[ref[torch.nn.Module], ref[PatchAtUse]]] = []  # shared by all that `of` answers

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return self._by_host(self._moved.get(weight.device, self.patches), weight)

    def _by_host(self, patches: list[tuple], weight: torch.Tensor) -> torch.Tensor:
        dtype = computed_in(self.patches, weight.dtype)
        patched = comfy.lora.calculate_weight(
            patches, weight.to(dtype), self.key, intermediate_dtype=dtype, original_weights=self.originals
        )
        return patched.to(weight.dtype)

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
        device = _as_tensors_say(device)
        if device not in self._moved:
            if self.stays_home:
                return 0
            self._moved[device] = self._copy(device)
        return self.nbytes

    def wanted(self, weight: Any, device: torch.device) -> Wanted | None:
        """What to compile the kernel for that folds the patches into `weight` on `device`; None where none does."""
        return None

    def of(self, network: torch.nn.Module) -> PatchAtUse:
        """The function with these patches that moves with `network`: this one where it is the first to be asked for,
        and the same for all clones of that network, as long as one of them has it."""
        of_others = []
        for known, its in self._by_network:
            if known() is not network:
                of_others.append((known, its))
            elif (function := its()) is not None:
                return function
        of_others = [(known, its) for known, its in of_others if known() is not None]
        function = self
        if any(its() is self for _, its in of_others):
            function = copy.copy(self)
            function.stays_home, function._moved = False, {}
        self._by_network[:] = [*of_others, (ref(network), ref(function))]
        return function

    def _copy(self, device: torch.device) -> Any:
        return [(patch[0], _to(patch[1], device), *patch[2:]) for patch in self.patches]


@cache
def _as_tensors_say(device: torch.device) -> torch.device:
    """`mps` is `mps:0` to the tensors on it, and no key that they would find."""
    return torch.empty(0, device=device).device


class LowRankAtUse(PatchAtUse):
    """Patches that are all plain LoRAs of one weight.

    Args:
        adapters: the same as `patches`, in the same order.
        shape: the weight's.
        dtype: what the model computes in.
        way: one of `low_rank.WAYS`.
    """

    def __init__(
        self,
        key: str,
        patches: list[tuple],
        adapters: Sequence[low_rank.Adapter],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        way: str = "auto",
    ) -> None:
        super().__init__(key, patches)
        self.adapters = tuple(adapters)
        self.shape, self.dtype, self.way = shape, dtype, way

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.device.type == "cpu":
            return self._by_host(self.patches, weight)
        return self.factors(weight.device).fold(weight)

    def runs_beside(self, x_rows: int, weight: Any, device: torch.device) -> bool:
        """Whether a Linear adds the adapters' product to its own; else they go into its dense weight."""
        if self.way == "auto":
            return device.type != "cpu" and self.factors(device).run_beside(x_rows, weight, self.shape)
        return self.way == "runtime"

    def factors(self, device: torch.device) -> low_rank.Factors:
        """The factors on `device`: kept there since `move_to`, else made for this call."""
        return self._moved.get(device) or self._copy(device)

    @property
    def nbytes(self) -> int:
        return low_rank.nbytes(self.adapters, self.dtype)

    @property
    def rank(self) -> int:
        return sum(adapter.rank for adapter in self.adapters)

    def wanted(self, weight: Any, device: torch.device) -> Wanted | None:
        parts = low_rank.parts(self.adapters) if self.way != "runtime" else ()
        return Wanted(device, weight._params.ggml_type, self.dtype, self.shape, parts) if parts else None

    # --- to stream them with the block that uses them

    @property
    def packed_bytes(self) -> int:
        return low_rank.packed_bytes(self.adapters, self.dtype)

    def pack(self, memory: torch.Tensor) -> None:
        """Write the factors, as a device will have them, into host memory (uint8, `packed_bytes` long)."""
        low_rank.Factors.in_memory(self.adapters, self.dtype, memory, fill=True)

    def over(self, memory: torch.Tensor) -> low_rank.Factors:
        """The factors that were packed, over those bytes on a device."""
        return low_rank.Factors.in_memory(self.adapters, self.dtype, memory)

    def lend(self, device: torch.device, factors: low_rank.Factors | None) -> low_rank.Factors | None:
        """From now on use these on `device`, or none; what was used there before."""
        before = self._moved.pop(device, None)
        if factors is not None:
            self._moved[device] = factors
        return before

    def _copy(self, device: torch.device) -> low_rank.Factors:
        return low_rank.Factors(self.adapters, device, self.dtype)


def patch_at_use(
    key: str,
    patches: list[tuple],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    way: str = "auto",
    originals: dict | None = None,
) -> PatchAtUse:
    """The function for these patches of the weight `key`; `shape` and `dtype` are the dense weight's."""
    adapters = [_plain_lora(patch, shape) for patch in patches]
    plain = [adapter for adapter in adapters if adapter is not None]
    if len(plain) < len(patches):
        return PatchAtUse(key, patches, originals)
    return LowRankAtUse(key, patches, plain, shape, dtype, way)


def computed_in(patches: list[tuple], dtype: torch.dtype) -> torch.dtype:
    """What the host is to compute patches of a weight of `dtype` in.

    It does so in float32 where it writes them into a weight, and in the weight's own type where it uses them. In 16
    bits its OFT and BOFT end in an error that it only logs, because an inverse is float32 (`comfy/weight_adapter`), and
    DoRA adds the type's epsilon, 2^-7 in bfloat16, to norms of rows, which are about 1.
    """
    return torch.float32 if any(_needs_float32(patch[1]) for patch in patches) else dtype


def _needs_float32(value: Any) -> bool:
    if not isinstance(value, WeightAdapterBase):
        return False
    place = _DORA_SCALE.get(type(value))
    return isinstance(value, (OFTAdapter, BOFTAdapter)) or (place is not None and value.weights[place] is not None)


def joined(functions: list, function: PatchAtUse) -> list:
    """`functions` and then `function`: one with the last of them where both are LoRAs that go the same way."""
    last = functions[-1] if functions else None
    if not isinstance(last, LowRankAtUse) or not isinstance(function, LowRankAtUse) or last.way != function.way:
        return [*functions, function]
    patches, adapters = last.patches + function.patches, last.adapters + function.adapters
    return [*functions[:-1], LowRankAtUse(last.key, patches, adapters, last.shape, last.dtype, last.way)]


def of_network(functions: dict[str, list], network: torch.nn.Module) -> dict[str, list]:
    """A patcher's functions by weight, those of patches such as move with `network` alone."""
    return {
        name: [f.of(network) if isinstance(f, PatchAtUse) else f for f in found] for name, found in functions.items()
    }


def _plain_lora(patch: tuple, shape: tuple[int, ...]) -> low_rank.Adapter | None:
    """The patch as two matrices; None if it is, or does, anything more than adding their product to whole rows."""
    strength, value, strength_model, offset, function = patch
    if type(value) is not LoRAAdapter or strength_model != 1 or function is not None or len(shape) < 2:
        return None
    up, down, alpha, mid, dora_scale, reshape = value.weights
    if mid is not None or dora_scale is not None or reshape is not None or (offset is not None and offset[0] != 0):
        return None
    up, down = up.flatten(1), down.flatten(1)
    start, rows = (0, shape[0]) if offset is None else offset[1:]
    columns = torch.Size(shape[1:]).numel()
    if up.shape != (rows, down.shape[0]) or down.shape[1] != columns or start + rows > shape[0] or not len(down):
        return None
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    return low_rank.Adapter(up, down, strength * scale, start)


def _is_model(value: Any) -> bool:
    """Whether a patch is another model's weight (a merge, a model as a LoRA), which stays where it is: the device must
    not hold two models because a node merged them."""
    named = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)
    return isinstance(value, list) or (named and value[0] == "model_as_lora")


def _to(value: Any, device: torch.device) -> Any:
    if _is_model(value):
        return value
    if isinstance(value, torch.Tensor):
        return uploaded(value, device)
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
