"""The way most GGUF loaders for ComfyUI go, re-enacted to be measured beside ours; it is for nothing else.

Facts it keeps to, read in city96's ComfyUI-GGUF (795e451, December 2025), no line of which is here: the file is parsed
by `gguf.GGUFReader`, which decodes the whole header and maps the data with numpy; each tensor is `torch.from_numpy`
over that mapping, carries its type and logical shape, and becomes the layer's parameter as it is, without a file
slice; a layer dequantises its weight at each use. When the host offloads such a model from a GPU, `Module.to` copies
every weight into anonymous memory.

The dequantisers are ours, so its steps' seconds say nothing about theirs; its memory does.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.sd
import gguf
import torch
from pack.loaders.gguf.types import PLAIN, GGMLType
from pack.loaders.quant.dispatch import dequantize


class Blocks(torch.Tensor):
    """A weight's bytes, with the shape that the host asks for; what is made of it in one step is it too."""

    kind: GGMLType
    logical: torch.Size

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.logical

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Blocks) and "kind" not in vars(result):
            result.kind, result.logical = args[0].kind, args[0].logical
        return result


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    reader = gguf.GGUFReader(path)
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            data = torch.from_numpy(tensor.data)
        kind, shape = GGMLType(tensor.tensor_type), torch.Size(int(n) for n in reversed(tensor.shape))
        if kind in PLAIN:
            tensors[tensor.name] = data.view(shape)
            continue
        blocks = data.as_subclass(Blocks)
        blocks.kind, blocks.logical = kind, shape
        tensors[tensor.name] = blocks
    return tensors


class Operations(comfy.ops.manual_cast):
    class Linear(torch.nn.Module):
        def __init__(self, in_features: int, out_features: int, bias: bool = True, **_: Any) -> None:
            super().__init__()
            self.bias: torch.nn.Parameter | None = None

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
            self.weight = torch.nn.Parameter(state_dict[prefix + "weight"], requires_grad=False)
            if prefix + "bias" in state_dict:
                self.bias = torch.nn.Parameter(state_dict[prefix + "bias"], requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight.to(x.device)
            if isinstance(weight, Blocks):
                weight = dequantize(weight.as_subclass(torch.Tensor), weight.kind, weight.logical, x.dtype)
            bias = None if self.bias is None else self.bias.to(x.device, x.dtype)
            return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def model(tensors: dict[str, torch.Tensor]) -> Any:
    logging.getLogger().setLevel(logging.ERROR)  # the host lists every bias as unexpected
    return comfy.sd.load_diffusion_model_state_dict(tensors, model_options={"custom_operations": Operations})
