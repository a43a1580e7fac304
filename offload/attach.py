"""Block Swap on a MODEL: its blocks are found, and a patcher that streams them (`streamed_patcher`) takes its place.

`apply_block_swap` gives the model a network of its own over the same weights (`slots.twin`), so that the MODEL it was
made from, and the host's dynamic VRAM on that, stay as they are. `stream` makes one of a model that was just loaded,
which nobody else has. Both tell the host whom to call when a run begins and ends.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, PatcherInjection

from ..loaders import compat
from ..loaders.diffusion import ATTACHMENT
from ..loaders.gguf.reader import GGUFFile
from ..loaders.ops import MappedLayer
from ..loaders.patcher import restore
from ..loaders.tensors import reopened
from .attach_adapters import adapter_stream_of
from .blocks import Block, find_blocks
from .costs import SwapRequest
from .files import StoredFile
from .kept import give_back
from .residency import Residency
from .shelf import Shelf
from .slots import twin
from .streamed_patcher import StreamedPatcher, residency_of, streamed_class
from .unified import IN_PLACE

KEY = "sluice_block_swap"  # of injection and callbacks
HOME = torch.device("cpu")  # of what streams; under --highvram the host would move to VRAM what is out of use


def apply_block_swap(model: ModelPatcher, request: SwapRequest) -> ModelPatcher:
    """A clone of `model` whose weights stream as `request` says; `model` itself is left as it is.

    Raises:
        ValueError: the model has no blocks that could stream, or its file is gone.
    """
    _unload(model)
    give_back(model.model)  # of its file, which the clone locks for itself
    restore(model.model)
    if (residency := residency_of(model)) is not None and residency.shelf is not None:
        residency.shelf.bring_back()  # if unloading could not, this says why
        residency.shelf = None  # from now on two networks look at the mapping
    if model.offload_device != HOME:
        model.model.to(HOME)
        model.model.device = HOME
    network = twin(model.model, compat.dynamic_state(model.model))
    compat.forget_dynamic_state(network)
    network.__dict__.pop(IN_PLACE, None)  # what streams is not used in place
    _cast_where_dtypes_differ(network)
    network.device = HOME
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
    VRAM than the host's own two ways (benchmarks/results/block_swap_rivals_h200.txt); elsewhere nothing was measured,
    and None leaves the model to the host."""
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
    model.offload_device = model.model.device = HOME
    model.model._sluice_residency = Residency(blocks, request, shelf)
    init = model.cached_patcher_init  # how the host makes another one, for a second GPU for instance
    if init is not None:
        init = init[1][0] if init[0] is _loaded_again else init
        model.cached_patcher_init = (_loaded_again, (init, request))
    if isinstance(model, StreamedPatcher):
        return model
    model.__class__ = streamed_class(type(model))  # type: ignore[assignment, arg-type]
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


def _cast_where_dtypes_differ(network: torch.nn.Module) -> None:
    for module in network.modules():
        if hasattr(module, "comfy_cast_weights") and not isinstance(module, MappedLayer):
            declared = ((p.dtype, compat.model_dtype(module, n)) for n, p in module.named_parameters(recurse=False))
            if any(dtype != model_dtype for dtype, model_dtype in declared if model_dtype is not None):
                module.comfy_cast_weights = True  # type: ignore[assignment]
