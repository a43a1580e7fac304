"""What the quantisers are made of: the table of them, and writers of the fields of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..gguf.types import GGMLType

Quantiser = Callable[[torch.Tensor], torch.Tensor]

QUANTISERS: dict[GGMLType, Quantiser] = {}


def quantises(ggml_type: GGMLType) -> Callable[[Quantiser], Quantiser]:
    """Enter the decorated function into the table as the quantiser of `ggml_type`."""

    def enter(function: Quantiser) -> Quantiser:
        assert ggml_type not in QUANTISERS, f"two quantisers for {ggml_type.name}"
        QUANTISERS[ggml_type] = function
        return function

    return enter


def half_bytes(x: torch.Tensor) -> torch.Tensor:
    """Float32 `[n, count]` as the bytes of float16 values, `[n, 2 count]`."""
    return x.half().contiguous().view(torch.uint8)


def pack_nibbles(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Bytes of two four-bit codes (uint8) each."""
    return low | high << 4


def pack_pairs(q: torch.Tensor) -> torch.Tensor:
    """256 codes of two bits in 64 bytes: the 32 bytes of a half hold elements 0-31 in bits 0-1, 32-63 in 2-3, ..."""
    runs = q.view(-1, 2, 4, 32)
    return (runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6).flatten(1)


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bytes of eight bits each, the first lowest: 0 and 1 as uint8 `[..., 8]` to `[...]`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits << places).sum(-1, dtype=torch.uint8)


def word_bytes(words: torch.Tensor, nbytes: int) -> torch.Tensor:
    """The lowest `nbytes` bytes of every int64 word, little-endian: `[n, count]` to uint8 `[n, count nbytes]`."""
    return words.contiguous().view(torch.uint8).view(*words.shape, 8)[..., :nbytes].flatten(1)
