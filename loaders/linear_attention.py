"""What llama.cpp's converter did to the linear attention of Qwen 3.5, undone.

In each layer some value heads share a key head. transformers and the host have those of one key head side by side
(grouped), llama.cpp has the first of every key head, then the second of every key head (tiled). So the rows, or for the
output's matrix the columns, go back by whole heads. Blocks stay blocks where a head is a number of them; where two
heads share a block (a K-quant of 256 weights, a head of 128), the output's matrix becomes float32, which is one matrix
in each such layer. Where every value head has a key head of its own (0.8B, 2B), both orders are the same and nothing
is copied.

The decay is stored as -exp(A_log), so its logarithm comes back to the last places of float32, and the convolution
without its dimension of 1. Source: llama.cpp's converter, the classes Qwen3NextModel and Qwen3_5TextModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .gguf.types import BLOCKS
from .quant.layout import dense, is_gguf, quantized


@dataclass(frozen=True)
class Heads:
    """How many there are, and how wide one is."""

    keys: int
    values: int
    key_width: int
    value_width: int

    @staticmethod
    def of(metadata: Mapping[str, Any], architecture: str) -> Heads | None:
        """As the file says, or None if it contradicts itself."""
        named = ("group_count", "time_step_rank", "state_size", "inner_size")
        found = [metadata.get(f"{architecture}.ssm.{name}") for name in named]
        if not all(type(n) is int and n > 0 for n in found):
            return None
        keys, values, key_width, inner = found
        if values % keys or inner % values:  # type: ignore[operator]
            return None
        return Heads(keys, values, key_width, inner // values)  # type: ignore[arg-type, operator]

    def grouped(self, width: int) -> torch.Tensor:
        """Where in the tiled order each of `width` places of each value head is, in the grouped order."""
        places = torch.arange(self.values * width)
        return places.view(self.values // self.keys, self.keys, width).transpose(0, 1).reshape(-1)


def as_trained(heads: Heads, part: str, tensor: torch.Tensor) -> torch.Tensor:
    """One tensor of a layer, `part` being the host's name of it behind `linear_attn.`.

    Raises:
        ValueError: its shape is not that of so many heads.
    """
    if part == "A_log":
        tensor = torch.log(-dense(tensor, torch.float32))
    if part == "conv1d.weight":
        tensor = dense(tensor, torch.float32)
        tensor = tensor.reshape(tensor.shape[0], 1, tensor.shape[-1])
    first = 2 * heads.keys * heads.key_width  # rows of queries and keys before those of the values
    orders = {
        **{"in_proj_qkv.weight": (first, heads.value_width), "conv1d.weight": (first, heads.value_width)},
        "in_proj_z.weight": (0, heads.value_width),
        **dict.fromkeys(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"), (0, 1)),
    }
    columns = part == "out_proj.weight"
    if part not in orders and not columns:
        return tensor
    before, width = (0, heads.value_width) if columns else orders[part]
    length = before + heads.values * width
    if tensor.shape[-1 if columns else 0] != length:
        raise ValueError(f"is of shape {tuple(tensor.shape)}, and {heads.values} heads take {length}")
    if heads.values == heads.keys:
        return tensor
    if columns:
        return _columns(tensor, heads)
    return _rows(tensor, torch.cat([torch.arange(before), before + heads.grouped(width)]))


def _rows(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    if not is_gguf(tensor):
        return tensor[order]
    data, params = tensor._qdata, tensor._params
    if data.shape[0] != len(order):  # rows that are no whole blocks cannot be taken apart
        return dense(tensor, torch.float32)[order]
    return quantized(data[order], params.ggml_type, params.orig_shape, params.orig_dtype)


def _columns(tensor: torch.Tensor, heads: Heads) -> torch.Tensor:
    if is_gguf(tensor):
        data, params = tensor._qdata, tensor._params
        block = BLOCKS[params.ggml_type]
        rows = params.orig_shape[0]
        if heads.value_width % block.elements == 0 and data.shape[0] == rows:
            order = heads.grouped(heads.value_width // block.elements)
            moved = data.view(rows, -1, block.nbytes)[:, order]
            return quantized(moved.reshape(rows, -1), params.ggml_type, params.orig_shape, params.orig_dtype)
        tensor = dense(tensor, torch.float32)
    return tensor[:, heads.grouped(heads.value_width)]
