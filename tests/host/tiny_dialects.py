"""Other spellings of a state dict's keys, as the files of different makers have them. Runs inside the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from host.tiny_model import TinyModel

Arrays = dict[str, np.ndarray]

BLOCK_LISTS = ("double_blocks", "single_blocks", "joint_blocks", "layers", "double_layers", "single_layers")
WIDTH_KEYS = ("img_in.weight", "x_embedder.proj.weight", "cap_embedder.1.weight", "cond_seq_linear.weight")


def prefixed(native: Arrays, tiny: TinyModel) -> Arrays:
    return {f"model.diffusion_model.{key}": value for key, value in native.items()}


def hunyuan_video(native: Arrays, tiny: TinyModel) -> Arrays:
    """The spelling of Tencent's own files, which `supported_models.HunyuanVideo` turns into Flux's."""
    spelling = {
        "txt_in.t_embedder.in_layer.": "txt_in.t_embedder.mlp.0.",
        "txt_in.t_embedder.out_layer.": "txt_in.t_embedder.mlp.2.",
        "txt_in.c_embedder.in_layer.": "txt_in.c_embedder.linear_1.",
        "txt_in.c_embedder.out_layer.": "txt_in.c_embedder.linear_2.",
        "_mod.lin.": "_mod.linear.",
        "_attn.qkv.": "_attn_qkv.",
        "_mlp.0.": "_mlp.fc1.",
        "_mlp.2.": "_mlp.fc2.",
        "_attn.norm.query_norm.": "_attn_q_norm.",
        "_attn.norm.key_norm.": "_attn_k_norm.",
        ".norm.query_norm.": ".q_norm.",
        ".norm.key_norm.": ".k_norm.",
        "_attn.proj.": "_attn_proj.",
        ".modulation.lin.": ".modulation.linear.",
    }
    original = {}
    for key, value in native.items():
        for ours, theirs in spelling.items():
            key = key.replace(ours, theirs)
        original[key] = value
    return original


def diffusers(native: Arrays, tiny: TinyModel) -> Arrays:
    """Split and rename by the host's own map from diffusers' keys to (native key, rows)."""
    from comfy import utils

    blocks = {name: len({k.split(".")[1] for k in native if k.startswith(name + ".")}) for name in BLOCK_LISTS}
    width = next(native[k].shape[0] for k in WIDTH_KEYS if k in native)
    table = {
        "Flux": lambda: utils.flux_to_diffusers(
            {
                "depth": blocks["double_blocks"],
                "depth_single_blocks": blocks["single_blocks"],
                "hidden_size": width,
            }
        ),
        "SD3": lambda: utils.mmdit_to_diffusers({"depth": width // 64, "num_blocks": blocks["joint_blocks"]}),
        "ZImage": lambda: utils.z_image_to_diffusers({"n_layers": blocks["layers"], "dim": width}),
        "AuraFlow": lambda: utils.auraflow_to_diffusers(
            {
                "n_double_layers": blocks["double_layers"],
                "n_layers": blocks["double_layers"] + blocks["single_layers"],
            }
        ),
    }[tiny.family]()
    renamed, filled = {}, {key: np.zeros(value.shape[:1], bool) for key, value in native.items()}
    for key, target in sorted(table.items()):
        name, rows = (target, None) if isinstance(target, str) else target[:2]
        if name not in native:
            continue
        _, start, count = rows or (0, 0, native[name].shape[0])
        if not filled[name][start : start + count].any():  # some rows have two names, of two diffusers versions
            filled[name][start : start + count] = True
            renamed[key] = native[name][start : start + count]
    return renamed


DIALECTS: dict[str, Callable[[Arrays, TinyModel], Arrays]] = {
    "native": lambda native, tiny: native,
    "prefixed": prefixed,
    "diffusers": diffusers,
    "original": hunyuan_video,
}
