"""From an open GGUF file to the tensors of a state dict, without reading any weight.

Quantised matrices become `QuantizedTensor`s over the file mapping, plain types become torch tensors over it; both
tell the host where their bytes lie. Three repairs make the shapes what the model expects: `comfy.gguf.orig_shape`
(the converter flattened a tensor), a 5-D convolution that ggml's four dimensions folded, and leading dimensions of 1
that ggml does not count. Quantised vectors and what is no `.weight` become plain tensors here because they are small.
"""

from __future__ import annotations

import reprlib
import threading
import warnings
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch

from . import compat
from .gguf.errors import DAMAGED, shown
from .gguf.reader import GGUFError, GGUFFile, TensorInfo
from .gguf.types import NO_REFERENCE, PLAIN
from .quant.dispatch import dequantize
from .quant.layout import quantized, reshaped
from .quant.reference import PLAIN_DTYPES

# Below this many bytes a weight is dequantised when it is loaded: the host keeps modules this small resident and
# plain anyway, and a kernel launch would cost more than the bytes save.
SMALL_BYTES = 16 * 1024

# ggml's `ggml_n_dims` ignores outer dimensions of 1, and what writes a file by it (stable-diffusion.cpp, llama.cpp)
# drops them. These parameters have them in every model of the host that has the name (comfy/ldm: wan/model.py,
# wan/model_animate.py, joyimage/model.py, modules/diffusionmodules/mmdit.py, aura/mmdit.py, lumina/model.py,
# krea2/model.py), and the host's detection reads some. Last parts of the name -> dimensions.
RANKS = {
    **dict.fromkeys(("modulation", "modulate_table", "emb_pos"), 3),
    **dict.fromkeys(("pos_embed", "positional_encoding", "register_tokens"), 3),
    **dict.fromkeys(("x_pad_token", "cap_pad_token", "siglip_pad_token"), 2),
    "padding_tokens": 4,
    "txtfusion.projector.weight": 2,
}

# Matrices that stable-diffusion.cpp writes as convolutions of one pixel.
_PIXEL_CONVOLUTIONS = (".proj_in.weight", ".proj_out.weight")


def state_dict(file: GGUFFile) -> dict[str, torch.Tensor]:
    """Every tensor of `file`, in file order, under its own name.

    Raises:
        GGUFError: a type without a dequantiser, or an orig_shape that does not fit its tensor.
    """
    locks = [threading.Lock() for _ in file.parts]
    biases = {name: info.shape[0] for name, info in file.tensors.items() if name.endswith(".bias") and info.shape}
    result = {}
    for name, info in file.tensors.items():
        if info.ggml_type in NO_REFERENCE:
            raise GGUFError(
                file.path,
                f"tensor '{name}' is of type {info.ggml_type.name}, which nothing turns back into weights exactly",
                "use a conversion in another type, such as Q8_0 or Q4_K",
            )
        shape = _logical_shape(file, info, biases)
        data = _mapped(file, info, locks[info.part])
        if info.ggml_type in PLAIN:
            result[name] = data.view(shape)
        elif len(shape) < 2 or not name.endswith(".weight") or info.nbytes <= SMALL_BYTES:
            result[name] = dequantize(data, info.ggml_type, shape, torch.float32)
        else:
            result[name] = quantized(data, info.ggml_type, shape)
    return result


def reopened(file: GGUFFile) -> Callable[[Path, int], torch.Tensor]:
    """Open a closed file again. What this returns gives the tensor at an offset of a part, flat, as its bytes.

    Raises:
        GGUFError: it is not the file that was loaded any more.
    """
    file.reopen()
    locks = [threading.Lock() for _ in file.parts]
    found = {(file.parts[info.part], info.offset): info for info in file.tensors.values()}

    def data(part: Path, offset: int) -> torch.Tensor:
        info = found[part, offset]
        return _mapped(file, info, locks[info.part]).view(torch.uint8)

    return data


def _mapped(file: GGUFFile, info: TensorInfo, lock: threading.Lock) -> torch.Tensor:
    """The tensor's bytes as a flat tensor over the mapping: uint8 when quantised, else its own dtype."""
    dtype = PLAIN_DTYPES.get(info.ggml_type, torch.uint8)
    if info.nbytes == 0:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        # The mapping is read-only by design; nothing here or in the host writes to a weight in place.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        data = torch.frombuffer(file.view(info.name), dtype=dtype)
    compat.attach_file_slice(data, file.file_handle(info.part), lock, info.offset)
    return data


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _logical_shape(file: GGUFFile, info: TensorInfo, biases: dict[str, int]) -> tuple[int, ...]:
    stated = file.metadata.get(f"comfy.gguf.orig_shape.{info.name}")
    if stated is not None:
        if not _is_shape(stated) or prod(stated) != prod(info.shape):
            key, value = shown(f"comfy.gguf.orig_shape.{info.name}"), reprlib.repr(stated)
            problem = f"metadata key {key} is {value}, which is no shape of the tensor's {prod(info.shape)} elements"
            raise GGUFError(file.path, problem, DAMAGED)
        return tuple(stated)
    # ggml has four dimensions, so a 3-D convolution [out, in, d, h, w] is stored as [out * in, d, h, w]. Its bias
    # still has one element for each output channel.
    out_channels = biases.get(info.name.removesuffix(".weight") + ".bias", 0)
    if len(info.shape) == 4 and 0 < out_channels < info.shape[0] and info.shape[0] % out_channels == 0:
        return (out_channels, info.shape[0] // out_channels, *info.shape[1:])
    rank = next((rank for end, rank in RANKS.items() if f".{info.name}".endswith(f".{end}")), 0)
    return (1,) * (rank - len(info.shape)) + info.shape


def with_plain_projections(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with the projections of a UNet's transformers as matrices, as SDXL has them. SD 1.5 really has
    convolutions there, so this is for a model that is not recognised without."""
    return {
        name: reshaped(tensor, tuple(tensor.shape[:2]))
        if name.endswith(_PIXEL_CONVOLUTIONS) and tensor.dim() > 2 and tensor.shape[2:].numel() == 1
        else tensor
        for name, tensor in tensors.items()
    }
