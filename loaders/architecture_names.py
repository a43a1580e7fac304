"""What a GGUF file calls the architecture of a diffusion model or text encoder (`general.architecture`).

ComfyUI's classes have names of their own. The names in files are those of the converters that people use: city96's for
diffusion models, which its loader insists on, and llama.cpp's for text encoders. A family that neither has a name for
gets the host's in small letters; our loader goes by the tensors in any case (architectures.py).
"""

from __future__ import annotations

# The host's class of a model's configuration (comfy/supported_models.py) -> the name in files. A subclass that is not
# here has the name of its nearest base that is.
DIFFUSION = {
    "SD15": "sd1",
    "SD20": "sd1",
    "SDXLRefiner": "sdxl",
    "SDXL": "sdxl",
    "SSD1B": "sdxl",
    "SD3": "sd3",
    "Flux": "flux",
    "Flux2": "flux",
    "Chroma": "flux",
    "LongCatImage": "flux",
    "AuraFlow": "aura",
    "HiDream": "hidream",
    "CosmosT2V": "cosmos",
    "CosmosT2IPredict2": "cosmos",
    "Anima": "cosmos",
    "LTXV": "ltxv",
    "HunyuanVideo": "hyvid",
    "WAN21_T2V": "wan",
    "Lumina2": "lumina2",
    "QwenImage": "qwen_image",
}

# How the host's name of a text encoder begins -> llama.cpp's.
TEXT = (
    ("umt5", "t5encoder"),
    ("mt5", "t5encoder"),
    ("pile_t5", "t5encoder"),
    ("t5", "t5encoder"),
    ("llama", "llama"),
    ("qwen25", "qwen2vl"),
    ("qwen3vl", "qwen3vl"),
    ("qwen3", "qwen3"),
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3"),
    ("gemma4", "gemma4"),
    ("mistral", "llama"),
    ("gpt_oss", "gpt-oss"),
)


def of_diffusion_model(config: type) -> str:
    """The name for the host's configuration class `config`."""
    named = (DIFFUSION[base.__name__] for base in config.__mro__ if base.__name__ in DIFFUSION)
    return next(named, config.__name__.lower())


def of_text_encoder(name: str) -> str:
    """The name for what the host calls `name`, such as `t5xxl` or `clip_l`."""
    return next((known for start, known in TEXT if name.startswith(start)), name)
