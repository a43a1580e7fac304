"""Every name of the host that is not its public interface, in one place, each with a probe.

ComfyUI promises its nodes API; what a weight needs below that (layer classes, file slices, the casting of one
layer's weights) moves between releases. Code elsewhere imports these from here, so that a host that renames one
is mended, or refused with a sentence, in this file. Supported: ComfyUI 0.18 and later.
"""

from __future__ import annotations

import threading
from typing import Any

import comfy.memory_management
import comfy.ops
import torch

# Told before every layer's forward, where the host interrupts a run that the user cancelled.
run_every_op = comfy.ops.run_every_op

# The host streams a weight from its file to pinned memory or the GPU by itself when the weight's storage says where
# its bytes lie. Reads share one file position, so early hosts bind a slice to the thread that made it, later ones
# take a lock.
_FileSlice = comfy.memory_management.TensorFileSlice


def attach_file_slice(tensor: torch.Tensor, handle: Any, lock: Any, offset: int) -> None:
    """Tell the host that `tensor` (contiguous, alone in its storage) is the bytes of `handle` from `offset` on."""
    guard = {"lock": lock} if "lock" in _FileSlice._fields else {"thread_id": threading.get_ident()}
    located = _FileSlice(file_ref=handle, offset=offset, size=tensor.nbytes, **guard)
    tensor.untyped_storage()._comfy_tensor_file_slice = located  # type: ignore[attr-defined]


def set_model_dtype(layer: torch.nn.Module, name: str, dtype: torch.dtype) -> None:
    """Tell the dynamic patcher what to cast the layer's plain parameter `name` to while it transfers it."""
    setattr(layer, f"{name}_comfy_model_dtype", dtype)


def pick_operations(storage_dtype: torch.dtype, manual_cast_dtype: torch.dtype | None) -> type:
    """The host's layer classes for unquantised weights: casting at each use only where the dtypes differ."""
    return comfy.ops.pick_operations(storage_dtype, manual_cast_dtype)


def cast_weights(
    layer: torch.nn.Module, dtype: torch.dtype, bias_dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    """Bring one layer's weight and bias to `device` by the host's own offloading; pair with `release_weights`.

    `dtype` equal to the weight's keeps it quantised; the host's weight functions (patches) run on the dense tensor.
    """
    return comfy.ops.cast_bias_weight(layer, None, dtype=dtype, device=device, bias_dtype=bias_dtype, offloadable=True)


release_weights = comfy.ops.uncast_bias_weight
