"""What a file says it is, and what its tensor names say it is.

ComfyUI detects a diffusion model from its tensors' names and shapes, so `general.architecture` is a hint: converters
write wrong values, forks invent their own, and many leave it out. It decides nothing that the tensors can decide;
it makes the message right when somebody picks a file that is no diffusion model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

TEXT_ENCODER, MMPROJ, LORA, VAE = "text encoder", "vision projector of a text encoder (mmproj)", "LoRA", "VAE"

# llama.cpp's names for the language models that serve as text encoders.
_TEXT_ENCODERS = (
    *("t5", "t5encoder", "llama", "llama4", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "qwen3vlmoe", "qwen35"),
    *("gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "mistral", "mistral3", "ministral", "gpt-oss", "phi3", "bert"),
)
_ARCHITECTURES = dict.fromkeys(_TEXT_ENCODERS, TEXT_ENCODER) | {"clip": MMPROJ, "mmproj": MMPROJ}

# llama.cpp's `general.type` of what is no model of its own.
_TYPES = {"adapter": LORA, "mmproj": MMPROJ}

# (how a tensor name begins or, after a dot, what it contains; what kind of file has such names). The first tensor
# that matches decides, and of several parts the first: a LoRA's names contain those of the model it is for.
_NAMES: tuple[tuple[str, str], ...] = (
    ("lora_unet_", LORA),
    ("lora_te", LORA),
    *((part, LORA) for part in (".lora_A.", ".lora_a", ".lora_up.", ".lora_down.", ".lokr_w", ".hada_w")),
    ("token_embd.", TEXT_ENCODER),
    ("enc.blk.", TEXT_ENCODER),
    ("blk.0.attn_", TEXT_ENCODER),
    ("text_model.encoder.", TEXT_ENCODER),
    ("v.blk.", MMPROJ),
    ("decoder.conv_out.", VAE),
    ("decoder.head.", VAE),
)

# What to do with a file of that kind.
REMEDIES = {
    TEXT_ENCODER: "load it with Load CLIP (GGUF), and choose a diffusion model here",
    MMPROJ: "it belongs to its text encoder, keep it beside that; choose a diffusion model here",
    LORA: "load it with a LoRA loader, behind this node, and choose a diffusion model here",
    VAE: "load a VAE with ComfyUI's 'Load VAE', and choose a diffusion model here",
}


def other_kind(metadata: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """What a file is when it is evidently no diffusion model: a key of `REMEDIES`, or None."""
    stated = metadata.get("general.type")
    if isinstance(stated, str) and stated in _TYPES:
        return _TYPES[stated]
    for name in names:
        for part, kind in _NAMES:
            if name.startswith(part) or (part.startswith(".") and part in name):
                return kind
    architecture = metadata.get("general.architecture")
    return _ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
