"""All tiny models, one or more for each architecture, and some again under other spellings of their keys or layouts of
their shapes."""

from __future__ import annotations

from dataclasses import replace

from host.tiny_image_models import IMAGE_MODELS
from host.tiny_model import TinyModel
from host.tiny_video_models import VIDEO_MODELS

DIALECTS_TRIED = (
    ("flux", "prefixed"),
    ("flux", "diffusers"),
    ("sd3", "prefixed"),
    ("sd3", "diffusers"),
    ("sdxl", "prefixed"),
    ("wan21_t2v", "prefixed"),
    ("qwen_image", "prefixed"),
    ("z_image", "diffusers"),
    ("aura", "diffusers"),
    ("hunyuan_video", "original"),
)
LAYOUTS_TRIED = (
    *((name, "dropped") for name in ("wan21_t2v", "z_image", "sd3", "aura", "joyimage", "krea2")),
    ("sdxl_prefixed", "pixel_convolutions"),
)

ARCHITECTURES: dict[str, TinyModel] = IMAGE_MODELS | VIDEO_MODELS
ARCHITECTURES |= {
    f"{name}_{dialect}": replace(ARCHITECTURES[name], dialect=dialect) for name, dialect in DIALECTS_TRIED
}
ARCHITECTURES |= {f"{name}_{layout}": replace(ARCHITECTURES[name], layout=layout) for name, layout in LAYOUTS_TRIED}
