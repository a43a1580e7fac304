"""GGUF and safetensors file(s) -> CLIP. What reads them is imported when it is used: ComfyUI starts the faster."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io

from ..loaders import clip_types
from ..loaders.gguf.splits import bytes_on_disk
from . import model_files

FOLDERS = "sluice_text_encoders"
NONE = "none"
NAMES = ("clip_name1", "clip_name2", "clip_name3", "clip_name4")
DEVICES = {"default": None, "cpu": torch.device("cpu")}
MARGIN = 1.1  # as ComfyUI multiplies what it is about to load


class LoadCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = model_files.names(FOLDERS)
        return io.Schema(
            node_id="SluiceCLIPLoader",
            display_name="Load CLIP (GGUF)",
            category="Sluice",
            description="Loads a text encoder of one to four GGUF or safetensors files without copying the GGUF files "
            "into RAM. Works like Load CLIP and its variants, for every type and text encoder that this ComfyUI knows.",
            search_aliases=["gguf", "clip loader gguf", "dual clip loader", "text encoder", "t5", "qwen", "llama"],
            inputs=[
                io.Combo.Input(
                    "clip_name1",
                    options=files,
                    tooltip="A .gguf or .safetensors file in models/text_encoders or models/clip. Press R after adding "
                    "a file.",
                ),
                io.Combo.Input(
                    "type",
                    options=clip_types.offered(kind.name.lower() for kind in comfy.sd.CLIPType),
                    tooltip="The model that the text is for. It decides how many files there must be: flux takes two, "
                    "most others one. Their order does not matter.",
                ),
                *(
                    io.Combo.Input(
                        name,
                        options=[NONE, *files],
                        default=NONE,
                        optional=True,
                        tooltip="A further file, where the type is made of several. GGUF and safetensors may be mixed.",
                    )
                    for name in NAMES[1:]
                ),
                io.Combo.Input(
                    "device",
                    options=list(DEVICES),
                    default="default",
                    optional=True,
                    advanced=True,
                    tooltip="default leaves it to ComfyUI. cpu computes the text on the CPU, more slowly, and keeps "
                    "the text encoder out of VRAM.",
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(
        cls,
        clip_name1: str | None = None,
        clip_name2: str | None = None,
        clip_name3: str | None = None,
        clip_name4: str | None = None,
    ) -> bool | str:
        # A name that another node supplies is not known yet, and so None; execute() looks for the file.
        try:
            for name in _chosen(clip_name1, clip_name2, clip_name3, clip_name4):
                model_files.find(FOLDERS, name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs: str | None) -> str:
        given = [inputs.get(name, NONE) for name in NAMES]
        from ..loaders import mmproj
        from ..offload.unified import mode

        # Which file a linked name will be is not known yet, so a change of any of them counts.
        names = model_files.names(FOLDERS) if None in given else _chosen(*given)
        # A projector that was put beside a model since belongs to it.
        paths = [folder_paths.get_full_path(FOLDERS, name) for name in names]
        beside = [str(other) for path in paths if path for other in mmproj.beside(path)]
        return "; ".join([*(model_files.stamp(FOLDERS, name) for name in names), *beside, mode()])

    @classmethod
    def execute(cls, clip_name1: str, type: str, device: str = "default", **others: str) -> io.NodeOutput:
        from ..loaders.text_encoder import load_text_encoder
        from ..offload.attach_arrival import arriving
        from ..offload.attach_unified import in_place_if_wanted, wanted

        names = _chosen(clip_name1, *(others.get(name) for name in NAMES[1:]))
        paths = [model_files.find(FOLDERS, name) for name in names]
        embeddings = folder_paths.get_folder_paths("embeddings")
        in_place, _ = wanted(DEVICES[device])
        classic = in_place or _fits([Path(path) for path in paths], DEVICES[device])
        clip = load_text_encoder(paths, type, DEVICES[device], embeddings, disable_dynamic=classic)
        in_place_if_wanted(arriving(clip.patcher))
        return io.NodeOutput(clip)


def _chosen(*names: str | None) -> list[str]:
    return [name for name in names if name not in (None, NONE)]


def _fits(paths: list[Path], device: torch.device | None) -> bool:
    """Whether a GPU has room for all of a text encoder in GGUF files. It is then faster as a model of the classic kind,
    also where ComfyUI's dynamic VRAM is on: it comes at the link's speed, out of the system's cache and without a copy
    of its own in RAM (benchmarks/results/stages_h200.txt). One that does not fit is better off with dynamic VRAM."""
    if not any(path.suffix.lower() == ".gguf" for path in paths):
        return False
    device = comfy.model_management.text_encoder_device() if device is None else device
    room = comfy.model_management.get_total_memory(device) - comfy.model_management.minimum_inference_memory()
    return device.type == "cuda" and MARGIN * sum(map(bytes_on_disk, paths)) <= room
