"""What a file says it is, and what its tensor names say it is.

ComfyUI detects a diffusion model from its tensors' names and shapes, so `general.architecture` is a hint: converters
write wrong values, forks invent their own, and many leave it out. It decides nothing that the tensors can decide;
it makes the message right when somebody picks a file that is no diffusion model.
"""

from __future__ import annotations

from collections.abc import Iterable

# llama.cpp's names for the language models that serve as text encoders.
TEXT_ENCODERS = frozenset(
    {
        *("t5", "t5encoder", "llama", "llama4", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "qwen3vlmoe", "qwen35"),
        *("gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "mistral", "mistral3", "ministral", "gpt-oss", "phi3"),
        *("bert", "clip", "mmproj"),
    }
)

# (how a tensor name begins or contains, what kind of file has such names); the first that matches decides.
_NAMES: tuple[tuple[str, str], ...] = (
    ("token_embd.", "text encoder"),
    ("enc.blk.", "text encoder"),
    ("blk.0.attn_", "text encoder"),
    ("text_model.encoder.", "text encoder"),
    ("v.blk.", "vision projector of a text encoder (mmproj)"),
    ("lora_unet_", "LoRA"),
    (".lora_A.", "LoRA"),
    (".lora_down.", "LoRA"),
    ("decoder.conv_out.", "VAE"),
    ("decoder.head.", "VAE"),
)

# What to do with a file of that kind.
REMEDIES = {
    "text encoder": "load it with 'Load CLIP (GGUF)' instead, and choose a diffusion model here",
    "vision projector of a text encoder (mmproj)": "it is found by itself beside its text encoder; choose a diffusion "
    "model here",
    "LoRA": "load it with 'Apply LoRA' instead, and choose a diffusion model here",
    "VAE": "load a VAE with ComfyUI's 'Load VAE', and choose a diffusion model here",
}


def other_kind(architecture: str | None, names: Iterable[str]) -> str | None:
    """What a file is when it is evidently no diffusion model: a key of `REMEDIES`, or None."""
    for name in names:
        for part, kind in _NAMES:
            if name.startswith(part) or (part.startswith(".") and part in name):
                return kind
    return "text encoder" if architecture in TEXT_ENCODERS else None
