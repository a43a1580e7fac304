"""Names of adapter tensors that ComfyUI does not know, turned into ones that it does.

ComfyUI maps the dialects of kohya, diffusers, PEFT and others (`comfy.lora`), and `convert_lora` those of single
models. What is left, and is here:

    GGUF        NAME.weight.lora_a, NAME.weight.lora_b and one alpha for all (llama.cpp's convert_lora_to_gguf.py)
    PEFT DoRA   NAME.lora_magnitude_vector[.weight], a vector (of a convolution [1, N, 1, ...]), is what others call
                NAME.dora_scale, a column with as many dimensions as the weight
    prefixes    base_model.model.NAME, transformer.NAME, plain NAME and others, where it is diffusion_model.NAME that
                is known
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")

GGUF_FACTORS = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight"}
MAGNITUDES = (".lora_magnitude_vector.weight", ".lora_magnitude_vector")
KNOWN_PREFIX = "diffusion_model."
PREFIXES = ("base_model.model.", "model.diffusion_model.", "transformer.", "unet.", "")

# What ComfyUI looks for behind the name of a weight (comfy/lora.py and comfy/weight_adapter).
ENDINGS = (
    *(f".lora_{part}.weight" for part in ("up", "down", "mid", "A", "B", "A.default", "B.default")),
    *(f"{joint}lora.{part}.weight" for joint in "._" for part in ("up", "down")),
    *(f".lora_linear_layer.{part}.weight" for part in ("up", "down")),
    *(".lora_A", ".lora_B", ".alpha", ".dora_scale", ".reshape_weight"),
    *(f".hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f".lokr_{part}" for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")),
    *(f".{part}.weight" for part in ("a1", "a2", "b1", "b2")),
    *(".oft_blocks", ".rescale", ".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm"),
)
DOWN = (".down.weight", "_down.weight", ".lora_A", ".lora_A.weight", ".lora_A.default.weight")  # [rank, columns]
OF_THE_BIAS = (".diff_b", ".b_norm")
_JOINTS = re.compile("[._]")
_ENDINGS = frozenset(ENDINGS)

# How the text encoder's part of an adapter begins.
TEXT_ENCODER_PREFIXES = ("lora_te", "lora_prior_te", "text_encoder", "text_model.", "base_model.model.text_model.")


def of_gguf(tensors: Mapping[str, torch.Tensor], alpha: Any) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF adapter; `alpha` is its metadata's, for every pair, absent or 0 where it has none."""
    renamed = {}
    for name, tensor in tensors.items():
        ending = name[name.rfind(".") :]
        if ending not in GGUF_FACTORS:
            renamed[name] = tensor
            continue
        stem = name.removesuffix(ending).removesuffix(".weight")
        renamed[stem + GGUF_FACTORS[ending]] = tensor
        if isinstance(alpha, (int, float)) and alpha:
            renamed[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return renamed


def canonical(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with PEFT's magnitudes as ComfyUI wants them."""
    renamed = {}
    for name, tensor in tensors.items():
        ending = next((end for end in MAGNITUDES if name.endswith(end)), None)
        if ending is None:
            renamed[name] = tensor
        else:
            renamed[name.removesuffix(ending) + ".dora_scale"] = tensor.reshape(-1, *[1] * max(tensor.dim() - 1, 1))
    return renamed


@lru_cache(maxsize=1 << 14)  # LoRAs for one model have the same names
def split(name: str) -> tuple[str, str]:
    """The name of a weight and what of its adapter the tensor is; that is empty where it is not known."""
    starts = (joint.start() for joint in _JOINTS.finditer(name))
    start = next((start for start in starts if name[start:] in _ENDINGS), len(name))
    return name[:start], name[start:]


def with_known_prefix(tensors: Mapping[str, Value], known: Collection[str]) -> dict[str, Value]:
    """The same tensors; names that are not `known` under the prefix that makes them so, where one does."""
    renamed = {}
    for name, tensor in tensors.items():
        stem, ending = split(name)
        renamed[(stem if stem in known else _with_prefix(stem, known)) + ending] = tensor
    return renamed


def _with_prefix(stem: str, known: Collection[str]) -> str:
    for prefix in PREFIXES:
        candidate = KNOWN_PREFIX + stem.removeprefix(prefix)
        if stem.startswith(prefix) and candidate in known:
            return candidate
    return stem


def concerned(names: Mapping[str, Value], tensors: Collection[str]) -> dict[str, Value]:
    """Those of ComfyUI's `names` that a tensor's name goes on from, with `.` or `_`: it looks for all that an adapter
    may have of each, and knows a weight by a dozen names."""
    stems = {stem for name in tensors for stem in _stems(name)}
    return {name: target for name, target in names.items() if name in stems}


@lru_cache(maxsize=1 << 14)
def _stems(name: str) -> tuple[str, ...]:
    return tuple(name[: joint.start()] for joint in _JOINTS.finditer(name))


def is_for_text_encoder(name: str) -> bool:
    return name.startswith(TEXT_ENCODER_PREFIXES)
