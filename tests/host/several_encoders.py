"""Text encoders made of several files, in both orders, against the host's from safetensors with the same numbers.

Runs inside the host: `python several_encoders.py FOLDER`. Prints one JSON line for each case. Each encoder is compared
by itself, because the tiny ones have widths that the types' own ways of joining do not expect.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path

FOLDER = Path(sys.argv[1])
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from host import encoder_files  # noqa: E402
from host.tiny_encoder import CLIP_SIZES, ENCODERS, TEXT, VOCABULARY, TinyEncoder  # noqa: E402
from pack.loaders import clip_types  # noqa: E402
from pack.loaders.text_encoder import load_text_encoder  # noqa: E402

torch.set_num_threads(1)

SMALL_CLIP = {**CLIP_SIZES, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
CLIP_G = TinyEncoder(
    "clip_model:CLIPTextModel",
    "stable_diffusion",
    "",
    {},
    {"clip_config_bigg.json": {**SMALL_CLIP, "num_hidden_layers": 32, "projection_dim": 64}},  # the host counts layers
)
TINY = {"clip_l": ENCODERS["clip_l"], "clip_g": CLIP_G, "t5xxl": ENCODERS["t5_xxl"], "llama": ENCODERS["llama3"]}
TOKENS = {"clip_l": "l", "clip_g": "g"}  # what the tokens of an encoder are called, where it is not its own name
ALL = replace(
    TINY["llama"],
    sizes={place: sizes for tiny in TINY.values() for place, sizes in tiny.sizes.items()},
    json={name: sizes for tiny in TINY.values() for name, sizes in tiny.json.items()},
)
# The type, its files in the order of the node's inputs (those with a star are safetensors).
CASES = {
    "flux": ("flux", ["clip_l", "t5xxl"]),
    "sd3 with a safetensors": ("sd3", ["clip_l*", "clip_g", "t5xxl"]),
    "sdxl": ("sdxl", ["clip_l", "clip_g"]),
    "hidream": ("hidream", ["clip_l", "clip_g", "t5xxl", "llama"]),
    "hidream with two safetensors": ("hidream", ["clip_l*", "clip_g*", "t5xxl", "llama"]),
}


def write() -> None:
    for name, tiny in TINY.items():
        made = encoder_files.files_of(tiny)
        encoder_files.write_model(FOLDER / f"{name}.gguf", tiny, made)
        encoder_files.write_safetensors(FOLDER / f"{name}.safetensors", tiny, made)


def encoded(clip: comfy.sd.CLIP, name: str) -> torch.Tensor:
    """What one of the encoders makes of the text."""
    clip.load_model()
    batches = clip.tokenize(TEXT)[TOKENS.get(name, name)]
    rows = VOCABULARY if TINY[name].arch else 49408
    tokens = [[(int(token) % rows, weight) for token, weight, *_ in batch] for batch in batches]
    return getattr(clip.cond_stage_model, name).encode_token_weights(tokens)[0]


def theirs(clip_type: str, names: list[str]) -> comfy.sd.CLIP:
    host_type = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    paths = [str(FOLDER / f"{name}.safetensors") for name in names]
    clip = comfy.sd.load_clip(paths, None, host_type, {"dtype": torch.float32})
    for parameter in clip.cond_stage_model.parameters():
        parameter.data = parameter.data.clone()  # BLAS rounds by alignment
        parameter.requires_grad_(False)
    return clip


def compare(clip_type: str, files: list[str]) -> dict[str, object]:
    clip_types.check_count(clip_type, len(files))
    names = [file.rstrip("*") for file in files]
    paths = [FOLDER / (f"{file[:-1]}.safetensors" if file.endswith("*") else f"{file}.gguf") for file in files]
    host = theirs(clip_type, names)
    expected = {name: encoded(host, name) for name in names}
    clips = [load_text_encoder(given, clip_type) for given in (paths, paths[::-1])]
    found = [{name: encoded(clip, name) for name in names} for clip in clips]
    loaded = clips[0].patcher.get_attachment("sluice")
    return {
        "classes": sorted({type(clip.cond_stage_model).__name__ for clip in (host, *clips)}),
        "files": sorted(one.file.path.name for one in (loaded, *loaded.others)),
        "wanted": sorted(path.name for path in paths if path.suffix == ".gguf"),
        "spread": {name: float(value.std()) for name, value in expected.items()},
        "differ": [name for name in names for one in found if not torch.equal(one[name], expected[name])],
    }


def main() -> None:
    with encoder_files.shrunk(ALL), torch.inference_mode():
        write()
        for case, (clip_type, files) in CASES.items():
            try:
                result = compare(clip_type, files)
            except Exception:
                result = {"error": traceback.format_exc()}
            print(json.dumps({"case": case, **result}), flush=True)


main()
