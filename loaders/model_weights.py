"""The weights of a loaded model as it computes with them, for saving: LoRAs and merges included, one at a time.

The host's own way of saving hands every tensor to safetensors, which knows neither blocks nor how to wait. Here each is
a `Weight` that is made when it is asked for: a quantised one is dequantised then, and patches are applied then, with
the host's arithmetic.

Names are those that the host's loaders expect in a file: a diffusion model's without `model.diffusion_model.`, a text
encoder's without the prefixes of the CLIP that it is part of, each in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .architecture_names import of_diffusion_model, of_text_encoder
from .patcher import PatchingAtUse
from .quant.layout import QuantizedTensor, is_gguf
from .safetensors_file import SafetensorsFile
from .save_model import Weight
from .saving import LazyWeight

# What core's quantised layers have beside the weight: a range of their inputs, for arithmetic in FP8 only, and a factor
# of the inputs, which belongs into the weight.
_INPUT_SCALE = ".pre_quant_scale"
_OF_COMPUTATION = (".input_scale", _INPUT_SCALE)


@dataclass(frozen=True)
class NewFile:
    """What goes into one file.

    Args:
        folder: which of the host's folders below its output folder it belongs into, for the loaders to list it.
        part: the text encoder's name, "" for a diffusion model.
        sources: the files that the weights are read from.
    """

    folder: str
    part: str
    architecture: str
    weights: list[Weight]
    metadata: dict[str, Any] = field(default_factory=dict)
    sources: tuple[Path, ...] = ()


def of_model(patcher: Any) -> NewFile:
    """The file for a MODEL."""
    model = patcher.model
    weights = list(_weights(patcher, model.diffusion_model, "diffusion_model."))
    # Marks such as `v_pred`, and parts that some models have beside the network.
    weights += [_plain(name, tensor) for name, tensor in model.state_dict_for_saving({}).items()]
    name = of_diffusion_model(type(model.model_config))
    return NewFile("diffusion_models", "", name, weights, _configuration(patcher), _sources(patcher))


def of_clip(clip: Any) -> list[NewFile]:
    """The files for a CLIP, one for each text encoder in it, in the host's order."""
    found: dict[str, list[Weight]] = {}
    for weight in _weights(clip.patcher, clip.cond_stage_model):
        encoder, inside, name = weight.name.partition(".transformer.")
        if inside:  # the rest are the host's own settings, such as `clip_l.logit_scale`
            found.setdefault(encoder, []).append(Weight(name, *_but_name(weight)))
    tokenizer = [_plain(name, torch.as_tensor(tensor)) for name, tensor in clip.tokenizer.state_dict().items()]
    sources = _sources(clip.patcher)
    return [
        NewFile("clip", name, of_text_encoder(name), [*weights, *tokenizer], sources=sources)
        for name, weights in found.items()
    ]


def _configuration(patcher: Any) -> dict[str, Any]:
    """The `config` that some architectures (LTX) are told apart by, from the metadata of the file of the model."""
    loaded = patcher.get_attachment("sluice")
    if loaded is not None:
        found = loaded.file.metadata.get("config")
    else:
        # How the host would load the model again: a function and its arguments, of which the first is the file.
        _, arguments, *_ = getattr(patcher, "cached_patcher_init", None) or (None, ())
        path = Path(arguments[0]) if arguments and isinstance(arguments[0], str) else None
        readable = path is not None and path.suffix.lower() in (".safetensors", ".sft") and path.is_file()
        found = SafetensorsFile(path).metadata.get("config") if path is not None and readable else None
    return {} if found is None else {"config": found}


def _but_name(weight: Weight) -> tuple[Any, ...]:
    return weight.shape, weight.dtype, weight.make, weight.blocks


def _weights(patcher: Any, module: torch.nn.Module, prefix: str = "") -> Iterator[Weight]:
    """Every parameter and persistent buffer of `module`, whose names have `prefix` before them in `patcher`."""
    patched = patcher.patches.keys() | {key for key, found in patcher.weight_wrapper_patches.items() if found}
    # Core's patcher knows the blocks of core's formats only, and ours leaves those to core.
    ours = patcher.model_state_dict_for_saving(module, prefix) if isinstance(patcher, PatchingAtUse) else {}
    persistent = module.state_dict().keys()
    buffers = {name: tensor for name, tensor in module.named_buffers() if name in persistent}
    tensors = {**dict(module.named_parameters()), **buffers}
    for name, tensor in tensors.items():
        if name.endswith(_OF_COMPUTATION):
            continue
        key = prefix + name
        blocks, shape = None, tuple(tensor.shape)
        make: Callable[[], torch.Tensor]
        lazy = None if _is_quantised_by_core(tensor) else ours.get(name)
        if isinstance(lazy, LazyWeight):
            make, shape = lazy.make, tuple(lazy.shape)
            if is_gguf(tensor) and key not in patched and not tensor._params.transposed:
                blocks = (tensor._params.ggml_type, tensor._qdata)
        elif key in patcher.patches and key not in patcher.backup:
            make = partial(_patched, patcher, key)
        else:
            make = partial(_dense, tensor)
        scale = tensors.get(f"{name.removesuffix('.weight')}{_INPUT_SCALE}")
        if scale is not None:
            make = partial(_times, make, scale)
        yield Weight(name, shape, tensor.dtype, make, blocks)


def _times(make: Callable[[], torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
    """A layer that multiplies its inputs by `scale` first, as one whose weight does so."""
    weight = make()
    return (weight * scale.to(weight.device)).to(weight.dtype)


def _plain(name: str, tensor: torch.Tensor) -> Weight:
    return Weight(name, tuple(tensor.shape), tensor.dtype, partial(_dense, tensor))


def _is_quantised_by_core(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, QuantizedTensor) and not is_gguf(tensor)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def _patched(patcher: Any, key: str) -> torch.Tensor:
    """The weight with its patches, as the host computes it."""
    return _dense(patcher.patch_weight_to_device(key, device_to=patcher.load_device, return_weight=True))


def _sources(patcher: Any) -> tuple[Path, ...]:
    """The files that our loaders mapped the model from; none for a model of core's."""
    loaded = patcher.get_attachment("sluice")
    files = [] if loaded is None else [loaded.file, *(other.file for other in getattr(loaded, "others", ()))]
    return tuple(part for file in files for part in file.parts)
