"""Diffusers' tensor names turned into ComfyUI's, for weights that must not be copied or dequantised.

The host has the maps (`convert_diffusers_mmdit`), but applies them by copying tensors into place: to_q, to_k and
to_v become three row ranges of one qkv, a few weights swap their halves. All of that moves whole rows. So the host
converts row *numbers* instead of rows: every tensor goes in as a column of integers that name its rows, and what
comes out says of which rows each new tensor consists. A tensor that comes out as it went in stays the mapped view;
a merged one is its parts' bytes in a row, still quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from .quant.layout import dense, is_gguf, quantized, rows_of

StateDict = dict[str, torch.Tensor]


def convert(tensors: StateDict, host_convert: Callable[[StateDict], StateDict | None]) -> StateDict | None:
    """Apply the host's diffusers conversion to `tensors` by rows.

    Returns None where the host does not know the names.

    Raises:
        ValueError: a merged tensor lacks some of its parts.
    """
    sources = [(name, t) for name, t in tensors.items() if t.dim() > 0]
    starts = [0]
    for _, t in sources:
        starts.append(starts[-1] + t.shape[0])
    columns = {
        name: torch.arange(start, stop).view(-1, *[1] * (t.dim() - 1))
        for (name, t), (start, stop) in zip(sources, pairwise(starts), strict=True)
    }
    converted = host_convert(columns)
    if converted is None:
        return None
    used = torch.cat([t.flatten() for t in converted.values()]) if converted else torch.empty(0, dtype=torch.int64)
    if used.numel() != used.unique().numel() or (
        used.numel() and not 0 <= int(used.min()) <= int(used.max()) < starts[-1]
    ):
        raise ValueError("a tensor that diffusers keeps in parts (such as to_q, to_k, to_v) lacks one of them")
    bounds = torch.tensor(starts)
    return {name: _assemble(rows.flatten(), [t for _, t in sources], bounds) for name, rows in converted.items()}


def _assemble(rows: torch.Tensor, sources: list[torch.Tensor], bounds: torch.Tensor) -> torch.Tensor:
    """The tensor made of `rows` (int64 numbers over all sources), as few consecutive runs as there are."""
    owner = torch.searchsorted(bounds, rows, right=True) - 1
    breaks = torch.nonzero((rows.diff() != 1) | (owner.diff() != 0)).flatten() + 1
    edges = [0, *breaks.tolist(), len(rows)]
    pieces = []
    for first, last in pairwise(edges):
        source = sources[int(owner[first])]
        start = int(rows[first] - bounds[owner[first]])
        pieces.append((source, start, start + last - first))
    if len(pieces) == 1 and pieces[0][1:] == (0, pieces[0][0].shape[0]):
        return pieces[0][0]
    encodings = {t._params.ggml_type if is_gguf(t) else t.dtype for t, _, _ in pieces}
    first = pieces[0][0]
    if len(encodings) == 1 and is_gguf(first):
        data = torch.cat([rows_of(t, start, stop)._qdata.flatten() for t, start, stop in pieces if is_gguf(t)])
        return quantized(data, first._params.ggml_type, (len(rows), *first.shape[1:]))
    # Parts of different types have no common encoding; float32 loses nothing of any of them.
    dtype = torch.float32 if len(encodings) > 1 else first.dtype
    return torch.cat([dense(t, dtype)[start:stop] for t, start, stop in pieces])
