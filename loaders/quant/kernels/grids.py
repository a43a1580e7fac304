"""The constant tables of the i-quants, in the form that the kernels read.

The grids come from gguf-py, which has them as float arrays; a row becomes one or two 32-bit words, so that a kernel
fetches it with one load. The largest is 8 KB: they stay in the first-level cache.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from gguf import quants

from ...gguf.types import GGMLType

# kvalues_iq4nl of ggml-common.h in llama.cpp
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

VALUES = {
    GGMLType.IQ4_NL: IQ4_VALUES,
    GGMLType.IQ4_XS: IQ4_VALUES,
}
BYTE_GRIDS = (GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ2_S, GGMLType.IQ3_XXS, GGMLType.IQ3_S)
NIBBLE_GRIDS = (GGMLType.IQ1_S, GGMLType.IQ1_M)
TABLES = frozenset((*VALUES, *BYTE_GRIDS, *NIBBLE_GRIDS))


def grid_rows(ggml_type: GGMLType) -> np.ndarray:
    """The grid of an i-quant as gguf-py publishes it: [rows, 4 or 8], small integers."""
    traits = getattr(quants, ggml_type.name)
    traits.init_grid()
    return traits.grid.reshape(traits.grid_shape).astype(np.int64)


@cache  # at most 9 types x the devices of the machine, 8 KB each; kept kernels hold their addresses
def table(ggml_type: GGMLType, device: torch.device) -> torch.Tensor:
    """The table that the kernel of `ggml_type` takes: float32 values, or int32 words of a grid."""
    if ggml_type in VALUES:
        return torch.tensor(VALUES[ggml_type], dtype=torch.float32, device=device)
    rows = grid_rows(ggml_type)
    if ggml_type in BYTE_GRIDS:
        packed = (rows + 64).astype(np.uint8).view(np.int32)
    else:
        packed = ((4 * (rows + 1)) << (4 * np.arange(8))).sum(axis=1).astype(np.uint32).view(np.int32)
    return torch.from_numpy(packed.ravel()).to(device)
