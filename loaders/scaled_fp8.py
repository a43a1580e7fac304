"""Safetensors in 8-bit floats, plain or scaled as the host writes them, among the files of a text encoder.

The host loads such a file with layer classes of its own, and there is one set of classes for all encoders of a type.
So each weight is made here what the host would make of it, its own `QuantizedTensor`, which our layers take as they
take plain weights. Vocabularies become float16, which holds every 8-bit float exactly: rows are gathered from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from comfy.quant_ops import QUANT_ALGOS, get_layout_class
from comfy_kitchen.tensor import QuantizedTensor

from .gguf.errors import shown
from .gguf.reader import GGUFError

FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
_MARK = ".comfy_quant"
_VOCABULARIES = ("shared.weight", "embed_tokens.weight", "token_embedding.weight", "word_embeddings.weight")
_ONLY_QUANTISED = (".weight_scale", ".input_scale", _MARK)


def with_host_weights(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, those in 8-bit floats as weights that our layers can hold.

    Args:
        tensors: after the host's `convert_old_quants`, which writes older spellings anew.

    Raises:
        GGUFError: a weight is in another format of the host (NVFP4, INT8, ...).
    """
    result = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        mark = tensors.get(f"{layer}{_MARK}")
        if mark is not None and layer != name:
            kind = json.loads(mark.numpy().tobytes()).get("format")
            if kind not in FORMATS.values():
                problem = f"its weight {shown(name)} is quantised as {kind}, which cannot be combined with GGUF files"
                raise GGUFError(path, problem, "choose the GGUF, FP8 or 16-bit version of this text encoder")
            result[name] = _weight(tensor, kind, tensors.get(f"{layer}.weight_scale"))
        elif tensor.dtype in FORMATS:
            matrix = name.endswith(".weight") and tensor.dim() == 2 and not name.endswith(_VOCABULARIES)
            result[name] = _weight(tensor, FORMATS[tensor.dtype], None) if matrix else tensor.to(torch.float16)
        elif not name.endswith(_ONLY_QUANTISED):
            result[name] = tensor
    return result


def _weight(tensor: torch.Tensor, kind: str, scale: torch.Tensor | None) -> torch.Tensor:
    algorithm = QUANT_ALGOS[kind]
    layout = algorithm["comfy_tensor_layout"]
    params = get_layout_class(layout).Params(
        scale=torch.ones(()) if scale is None else scale.float(),
        orig_dtype=torch.float32,
        orig_shape=tuple(tensor.shape),
    )
    return QuantizedTensor(tensor.view(algorithm["storage_t"]), layout, params)
