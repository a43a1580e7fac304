"""Blocks like FLUX.1-dev's, with products made in the way that is asked for: what dequantise_ahead.py runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant import quantize  # noqa: F401  (fills the table)
from pack.loaders.quant.kernels import launch
from pack.loaders.quant.quantize_table import QUANTISERS
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
PRIORITY = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Size:
    width: int
    head: int  # of attention: elements
    image: int  # tokens
    text: int
    doubles: int
    singles: int

    def shapes(self) -> list[tuple[int, int]]:
        """Of the weights, in order of use."""
        w = self.width
        stream = [(w, w), (4 * w, w), (w, 4 * w)]
        return [(3 * w, w), (3 * w, w), *stream, *stream] * self.doubles + [(7 * w, w), (w, 5 * w)] * self.singles


@dataclass
class Weights:
    """One group: bf16 weights, and the blocks that they come from."""

    dense: list[torch.Tensor]
    data: list[torch.Tensor]
    kind: GGMLType | None
    bias: list[torch.Tensor]


@dataclass
class Dense:
    """bf16."""

    weights: Weights

    def weight(self, i: int) -> torch.Tensor:
        return self.weights.dense[i]

    def linear(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight(i), self.weights.bias[i])

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(PRIORITY, set_priority=True):  # ComfyUI's order
            return F.scaled_dot_product_attention(q, k, v)

    def begin(self) -> None:
        """A pass begins."""

    def stream(self) -> Any:
        return nullcontext()


class Chain:
    """Blocks of FLUX: what lies between the products is what ComfyUI's do, with vectors in place of modulation."""

    def __init__(self, size: Size) -> None:
        self.size, w = size, size.width
        make = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)
        self.image, self.text = make(1, size.image, w), make(1, size.text, w)
        self.scale, self.shift, self.gate = 1 + 0.1 * make(1, 1, w), 0.1 * make(1, 1, w), 0.3 * make(1, 1, w)
        self.rotate, self.unit = make(1, 1, size.image + size.text, size.head).cos(), 1 + 0.1 * make(size.head)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.shift, F.layer_norm(x, x.shape[-1:]), self.scale)

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = qkv.view(1, qkv.shape[1], 3, -1, self.size.head).permute(2, 0, 3, 1, 4)
        return F.rms_norm(q, (self.size.head,), self.unit), F.rms_norm(k, (self.size.head,), self.unit), v

    def _attention(self, way: Dense, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = way.attention(q * self.rotate, k * self.rotate, v)
        return y.transpose(1, 2).reshape(1, y.shape[2], -1)

    @torch.inference_mode()
    def run(self, way: Dense) -> torch.Tensor:
        way.begin()
        image, text, n, i = self.image.clone(), self.text.clone(), self.size.text, 0
        for _ in range(self.size.doubles):
            streams = [self._heads(way.linear(i + k, self._normed(x))) for k, x in enumerate((image, text))]
            y = self._attention(way, *(torch.cat(both, dim=2) for both in zip(streams[1], streams[0], strict=True)))
            i += 2
            for x, seen in ((image, y[:, n:]), (text, y[:, :n])):
                x += way.linear(i, seen) * self.gate
                hidden = F.gelu(way.linear(i + 1, self._normed(x)), approximate="tanh")
                x += way.linear(i + 2, hidden) * self.gate
                i += 3
        x, w = torch.cat((text, image), dim=1), self.size.width
        for _ in range(self.size.singles):
            qkv, hidden = way.linear(i, self._normed(x)).split((3 * w, 4 * w), dim=-1)
            y = self._attention(way, *self._heads(qkv))
            x += way.linear(i + 1, torch.cat((y, F.gelu(hidden, approximate="tanh")), dim=2)) * self.gate
            i += 2
        return x


def random_blocks(kind: GGMLType, shape: tuple[int, int]) -> torch.Tensor:
    """As flux_step.py has them."""
    layout = BLOCKS[kind]
    blocks = torch.randint(0, 256, (shape[0] * shape[1] // layout.elements, layout.nbytes), device=DEVICE)
    scale = torch.tensor([0.0004], dtype=torch.float16, device=DEVICE).view(torch.uint8)
    blocks = blocks.to(torch.uint8)
    for at in range(0, 2 if kind == GGMLType.Q8_0 else 4, 2):
        blocks[:, at : at + 2] = scale
    return blocks


def groups(size: Size) -> Iterator[tuple[str, Weights]]:
    def normal(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * (0.6 / shape[1] ** 0.5)

    shapes = size.shapes()
    bias = [0.1 * torch.randn(rows, device=DEVICE, dtype=torch.bfloat16) for rows, _ in shapes]
    plain = [normal(shape) for shape in shapes]
    for name, kind, make in (
        ("normal", GGMLType.Q8_0, lambda i: QUANTISERS[GGMLType.Q8_0](plain[i].float().view(-1, 32))),
        ("random q8_0", GGMLType.Q8_0, lambda i: random_blocks(GGMLType.Q8_0, shapes[i])),
        ("random q4_k", GGMLType.Q4_K, lambda i: random_blocks(GGMLType.Q4_K, shapes[i])),
    ):
        if kind == GGMLType.Q4_K and size.width % 256:
            continue
        data = [make(i).contiguous() for i in range(len(shapes))]
        dense = [launch.dequantize(d, kind, s, torch.bfloat16) for d, s in zip(data, shapes, strict=True)]
        yield name, Weights(dense, data, kind, bias)
    yield "unquantised", Weights(plain, [], None, bias)
