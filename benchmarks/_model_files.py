"""GGUF files in the shapes of real models, written without holding a model in memory. Runs in the host."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

# Where in a block its float16 scales lie, and a value that keeps float16 activations finite through every network.
SCALES = {Type.Q8_0: (0,), Type.Q4_K: (0, 2)}
SCALE = {Type.Q8_0: 2e-5, Type.Q4_K: 1e-6}
PATTERN_BLOCKS = 1 << 17  # random blocks, repeated through the file: nothing here depends on more of them


Shapes = dict[str, tuple[int, ...]]


def flux(double_blocks: int = 19, single_blocks: int = 38) -> Shapes:
    """Every key of FLUX.1-dev with so many blocks, in the order of the host's state dict."""
    from comfy.ldm.flux.model import Flux

    return _keys(
        Flux, image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096,
        hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=double_blocks, depth_single_blocks=single_blocks,
        axes_dim=[16, 56, 56], theta=10000, txt_ids_dims=[], qkv_bias=True, guidance_embed=True,
    )  # fmt: skip


def wan(blocks: int = 40) -> Shapes:
    """Wan 2.1 and 2.2, text to video, 14 B."""
    from comfy.ldm.wan.model import WanModel

    return _keys(WanModel, dim=5120, ffn_dim=13824, num_heads=40, num_layers=blocks, image_model="wan2.1")


def qwen_image(blocks: int = 60) -> Shapes:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return _keys(QwenImageTransformer2DModel, num_layers=blocks, image_model="qwen_image")


def sdxl() -> Shapes:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return _keys(
        UNetModel, image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2],
        channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], use_linear_in_transformer=True, context_dim=2048,
        num_head_channels=64, use_spatial_transformer=True, legacy=False, num_classes="sequential",
        adm_in_channels=2816,
    )  # fmt: skip


def t5_xxl() -> Shapes:
    """The encoder of T5-XXL, as the host configures it."""
    return _t5("t5_config_xxl.json")


def t5_base() -> Shapes:
    return _t5("t5_config_base.json")


def _t5(config: str) -> Shapes:
    import json

    import comfy.text_encoders.t5 as t5

    sizes = json.loads(Path(t5.__file__).with_name(config).read_text(encoding="utf-8"))
    return _keys(t5.T5, config_dict=sizes)


def _keys(network: type, **sizes: object) -> Shapes:
    import comfy.ops
    import torch

    with torch.device("meta"):
        made = network(**sizes, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    return {key: tuple(value.shape) for key, value in made.state_dict().items()}


def write(path: Path, kind: Type, architecture: str, shapes: Shapes, sparse: bool = False) -> int:
    """Write a model with its matrices in `kind` and the rest in F32; return the file's size.

    Args:
        architecture: as converters name it (`general.architecture`).
        sparse: leave the data out, so that the file system makes it zeros and stores nothing.
    """
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, architecture)
    rows = {
        key: (kind if len(shape) == 2 and shape[-1] % elements == 0 else Type.F32, shape)
        for key, shape in shapes.items()
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
        data[:, start : start + 2] = np.array([SCALE[kind]], np.float16).view(np.uint8)
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
                # Norms and biases, or convolutions, whose sums must stay small.
                file.write(np.full(shape, 0.1 if len(shape) == 1 else 0.1 / prod(shape[1:]), np.float32).tobytes())
                continue
            while left:
                left -= file.write(pattern[:left])
        # Alignment after the last tensor, and what a sparse file was not given.
        return file.truncate(file.tell() + -file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT)


def flux_autoencoder() -> dict[str, Any]:
    """FLUX's VAE with the values that its layers begin with."""
    import torch
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    sizes = {
        "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    half = "comfy.ldm.modules.diffusionmodules.model"
    network = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{half}.Encoder", "params": sizes},
        decoder_config={"target": f"{half}.Decoder", "params": sizes},
    )
    made = {name: torch.empty_like(value) for name, value in network.state_dict().items()}
    for name, value in made.items():
        if value.dim() < 2:
            value.fill_(float(name.endswith("weight")))
        else:
            torch.nn.init.kaiming_uniform_(value, a=5**0.5)
    return made
