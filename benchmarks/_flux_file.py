"""GGUF files in the shapes of FLUX.1-dev, of any size, written without holding a model in memory. Runs in the host."""

from __future__ import annotations

from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

# Where in a block its float16 scales lie, and one value that keeps activations finite through the network.
SCALES = {Type.Q8_0: (0,), Type.Q4_K: (0, 2)}
SCALE = 0.0004
PATTERN_BLOCKS = 1 << 17  # random blocks, repeated through the file: nothing here depends on more of them


def shapes(double_blocks: int, single_blocks: int) -> dict[str, tuple[int, ...]]:
    """Every key of the network with so many blocks, in the order of the host's state dict."""
    import comfy.ops
    import torch
    from comfy.ldm.flux.model import Flux

    with torch.device("meta"):
        network = Flux(
            image_model="flux",
            in_channels=16,
            out_channels=16,
            patch_size=2,
            vec_in_dim=768,
            context_in_dim=4096,
            hidden_size=3072,
            mlp_ratio=4.0,
            num_heads=24,
            depth=double_blocks,
            depth_single_blocks=single_blocks,
            axes_dim=[16, 56, 56],
            theta=10000,
            txt_ids_dims=[],
            qkv_bias=True,
            guidance_embed=True,
            operations=comfy.ops.disable_weight_init,
        )
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def write(path: Path, kind: Type, double_blocks: int, single_blocks: int, sparse: bool = False) -> int:
    """Write the model with its matrices in `kind` and the rest in F32; return the file's size.

    Args:
        sparse: leave the data out, so that the file system makes it zeros and stores nothing.
    """
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "flux")
    rows = {
        key: (kind if len(shape) == 2 and shape[-1] % elements == 0 else Type.F32, shape)
        for key, shape in shapes(double_blocks, single_blocks).items()
    }
    for key, (stored, shape) in rows.items():
        block, size = gguf.GGML_QUANT_SIZES[stored]
        # The writer wants the shape of the bytes where a type has blocks.
        raw = shape if stored is Type.F32 else (*shape[:-1], shape[-1] // block * size)
        dtype = np.dtype(np.float32 if stored is Type.F32 else np.uint8)
        writer.add_tensor_info(key, raw, dtype, prod(shape) // block * size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    data = np.random.default_rng(0).integers(0, 256, (PATTERN_BLOCKS, nbytes), np.uint8)
    for start in SCALES[kind]:
        data[:, start : start + 2] = np.array([SCALE], np.float16).view(np.uint8)
    pattern = data.reshape(-1).data
    with path.open("r+b") as file:
        file.seek(0, 2)
        for stored, shape in rows.values():
            file.seek(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT, 1)
            block, size = gguf.GGML_QUANT_SIZES[stored]
            left = prod(shape) // block * size
            if sparse:
                file.seek(left, 1)
                continue
            if stored is Type.F32:
                file.write(np.full(shape, 0.5, np.float32).tobytes())
                continue
            while left:
                left -= file.write(pattern[:left])
        # Alignment after the last tensor, and what a sparse file was not given.
        return file.truncate(file.tell() + -file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT)
