"""Every name of the host that is not its public interface, in one place, each with a probe.

ComfyUI promises its nodes API; what a weight needs below that (layer classes, file slices, the casting of one
layer's weights) moves between releases. Code elsewhere imports these from here, so that a host that renames one
is mended, or refused with a sentence, in this file. Supported: ComfyUI 0.18 and later.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy_execution.utils import get_executing_context

from .patch_at_use import computed_in

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

pages = comfy.ops.comfy_aimdo.model_vbar  # the dynamic patcher's allocator, which is the host's dependency


def hold_resident(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The layer's weight and bias as they lie in the dynamic patcher's pages, held there until `let_go_resident`.

    It is what `cast_weights` finds for a layer without functions whose pages are still there since its last call, at a
    third of the cost. None where there is more to do: the host has to fill the page first, or does so ahead of time.
    """
    own = layer.__dict__
    filled = own.get("_v_signature")  # None where the last call found no memory for the page
    if filled is None or "_v" not in own or "_prefetch" in own:
        return None
    signature = pages.vbar_fault(own["_v"])
    if pages.vbar_signature_compare(signature, filled):
        return own["_v_weight"], own["_v_bias"]
    if signature is not None:
        pages.vbar_unpin(own["_v"])
    return None


def let_go_resident(layer: torch.nn.Module) -> None:
    """After the last use of what `hold_resident` gave was started on the device."""
    pages.vbar_unpin(layer._v)


# What the dynamic patcher keeps on a network and its modules. A copy of the network is loaded anew.
_DYNAMIC_STATE = (
    *("dynamic_vbars", "dynamic_pins", "dynamic_patchers"),
    *("_v", "_v_weight", "_v_bias", "_v_signature", "_prefetch", "_pins", "_pin_state", "_pin"),
)


def dynamic_state(network: torch.nn.Module) -> list[Any]:
    """The objects that stand for what the host has on a device for `network`: a copy must not have them."""
    states = [module.__dict__ for module in network.modules()]
    found = [state.get(name) for state in states for name in (*_DYNAMIC_STATE, "current_patcher")]
    return [value for value in found if value is not None]


def forget_dynamic_state(network: torch.nn.Module) -> None:
    for module in network.modules():
        for name in _DYNAMIC_STATE:
            module.__dict__.pop(name, None)


def model_dtype(module: torch.nn.Module, name: str) -> torch.dtype | None:
    """What the host declares a plain parameter to be, where a file's own dtype stands in for it; else None."""
    return getattr(module, f"{name}_comfy_model_dtype", None)


def file_slice(tensor: torch.Tensor) -> tuple[str, int, int, int] | None:
    """Path, size and time of modification (ns) of the file that a tensor's storage maps, and the tensor's offset.

    None if its bytes are in no file, or in one that cannot be named.
    """
    located = getattr(tensor.untyped_storage(), "_comfy_tensor_file_slice", None)
    if located is None or located.size != tensor.nbytes or tensor.storage_offset():
        return None
    handle = located.file_ref
    try:
        if isinstance(handle, int):  # a descriptor of the host's own mapping, or a Windows handle
            status, path = os.fstat(handle), os.readlink(f"/proc/self/fd/{handle}")
        else:
            status, path = os.fstat(handle.fileno()), handle.name
    except (OSError, ValueError):
        return None
    return str(path), status.st_size, status.st_mtime_ns, located.offset


def may_pin_memory() -> bool:
    return not comfy.model_management.args.disable_pinned_memory


_accounted = 0  # bytes of ours in the host's count of locked memory
_counting = threading.RLock()  # the collector may let go of a network, and so of locked memory, while we count


def pinned_memory_left() -> int:
    """Bytes that the host would still lock."""
    with _counting:
        _recount()
    most = comfy.model_management.MAX_PINNED_MEMORY
    return max(0, int(most - comfy.model_management.TOTAL_PINNED_MEMORY)) if most > 0 else 0


def account_pinned(nbytes: int) -> None:
    """Add to what the host counts as locked memory; negative when it is given back."""
    global _accounted
    with _counting:
        _recount()
        _accounted += nbytes
        comfy.model_management.TOTAL_PINNED_MEMORY += nbytes


def _recount() -> None:
    """The host of 0.18 sets its count to 0 when the last tensor that it locked itself is let go, and forgets ours: it
    would lock too much then, and the count become negative when ours are given back."""
    by_host = sum(comfy.model_management.PINNED_MEMORY.copy().values())  # first: ours may become less meanwhile
    if _accounted + by_host > comfy.model_management.TOTAL_PINNED_MEMORY:
        comfy.model_management.TOTAL_PINNED_MEMORY = _accounted + by_host


def patch_at_use(key: str, patches: dict) -> Any:
    """The host's own weight function for patches on a weight that it leaves in RAM."""
    return _PatchAtUse(key, patches)


class _PatchAtUse(comfy.model_patcher.LowVramPatch):
    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return super().__call__(weight.to(computed_in(self.patches[self.key], weight.dtype))).to(weight.dtype)


def cast_at_use(module: torch.nn.Module, forced: bool, elsewhere: bool) -> None:
    """Have a layer of the host cast its weights to the input's dtype if that is `forced` (the user chose the dtype),
    or to its device if they may be `elsewhere`, until the host undoes what it did to the layer's functions."""
    if not hasattr(module, "comfy_cast_weights"):
        return
    module.comfy_force_cast_weights = forced  # type: ignore[assignment]
    if (forced or elsewhere) and not hasattr(module, "prev_comfy_cast_weights"):
        module.prev_comfy_cast_weights = module.comfy_cast_weights
        module.comfy_cast_weights = True  # type: ignore[assignment]


def leave_unpatched(module: torch.nn.Module) -> None:
    """Tell the host, which is about to load a module whole, that nothing is to be written into its weights. After each
    module for which it does not know that it waits for the device, and so for all copies that are on their way."""
    if not any(p is not None and p.is_meta for p in module._parameters.values()):  # the host makes these
        module.comfy_patched_weights = True  # type: ignore[assignment]


def move_functions(module: torch.nn.Module, device: torch.device) -> int:
    """Move what patches a module's weights to `device`; bytes that moved."""
    return comfy.model_patcher.move_weight_functions(module, device)


def show_text(text: str) -> None:
    """Show a line below the node that runs, to whoever queued it; nothing where there is no server."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    node = get_executing_context()
    if server is not None and node is not None:
        server.send_progress_text(text, node.node_id, server.client_id)
