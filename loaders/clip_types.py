"""How many text encoders each of the host's types is made of, and what the host calls them.

The host decides by the number of files first and by the type second: a T5 alone under `flux` becomes Mochi's encoder
without a word, and the picture is noise. So the number is checked here. As the host's own loaders offer them
(nodes.py, comfy_extras/nodes_sd3.py, nodes_hidream.py); a type that this table does not know takes one.
"""

from __future__ import annotations

from collections.abc import Iterable

# `sdxl` is no type of its own in the host, but a pair of files under `stable_diffusion`.
SDXL, SDXL_IS = "sdxl", "stable_diffusion"

COUNTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys((SDXL, "flux", "hunyuan_dit", "hunyuan_video", "hunyuan_video_15"), (2,)),
    **dict.fromkeys(("kandinsky5", "kandinsky5_image", "newbie"), (2,)),
    **dict.fromkeys(("hunyuan_image", "ltxv", "ace"), (1, 2)),
    "sd3": (1, 2, 3),
    "hidream": (1, 2, 4),
}

# What the host calls an encoder within a pair or more -> what people call the file.
ENCODERS = {
    "clip_l": "CLIP-L",
    "clip_g": "CLIP-G",
    "t5xxl": "T5-XXL",
    "llama": "Llama 3 8B",
    "qwen25_7b": "Qwen2.5-VL 7B",
    "gemma3_12b": "Gemma 3 12B",
    "gemma": "Gemma 3 4B",
    "byt5_small": "ByT5 small (Glyph)",
    "hydit_clip": "HunyuanDiT's CLIP",
    "mt5xl": "mT5-XL",
}


def offered(host_types: Iterable[str]) -> list[str]:
    """The types for a menu: the host's, with `sdxl` behind the one that it is a pair of."""
    types = list(host_types)
    types.insert(types.index(SDXL_IS) + 1, SDXL)
    return types


def check_count(clip_type: str, given: int) -> None:
    """Raises ValueError unless `given` files make a text encoder of `clip_type`."""
    counts = COUNTS.get(clip_type, (1,))
    if given in counts:
        return
    wanted = " or ".join(map(str, counts))
    plural = "file" if counts == (1,) else "files"
    suited = ", ".join(sorted(name for name, numbers in COUNTS.items() if given in numbers and name != clip_type))
    other = f", or choose a type that is made of {given}: {suited}" if suited and given > 1 else ""
    remedy = "set the others to none" if given > max(counts) else "add the others"
    raise ValueError(f"type '{clip_type}' takes {wanted} {plural}, {given} given; {remedy}{other}")
