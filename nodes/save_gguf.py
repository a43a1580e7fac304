"""MODEL or CLIP -> GGUF file. What quantises is imported when it is used: ComfyUI starts the faster without it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io

from ..loaders.recipes import RECIPES, parse_overrides

if TYPE_CHECKING:
    from ..loaders.model_weights import NewFile

CPU = torch.device("cpu")
DEVICES = ("cuda",)  # ROCm calls itself so, too; others lack some of the operations
WORKSPACE_BYTES = 1 << 30  # what quantising takes on a GPU at most


class SaveGGUF(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SluiceSaveGGUF",
            display_name="Save GGUF",
            category="Sluice",
            description="Saves a model or a text encoder as a quantised GGUF file, with LoRAs and merges in it. Any "
            "loaded model will do: safetensors, FP8 or GGUF.",
            search_aliases=["gguf", "quantize", "convert to gguf", "export model"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "filename",
                    default="ComfyUI",
                    tooltip="The file's name, to which the type and a number are added; subfolders with /. It goes "
                    "into output/diffusion_models or output/clip, where the loaders find it (press R).",
                ),
                io.Combo.Input(
                    "quant_type",
                    options=list(RECIPES),
                    default="Q4_K_M",
                    tooltip="The type of most weights. Q8_0 looks like the original at half its size, Q5_K_M and "
                    "Q4_K_M are good at a third and a quarter. Norms, biases, the first and the last layers keep "
                    "their precision.",
                ),
                io.Model.Input("model", optional=True, tooltip="The model to save, with what was applied to it."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoders to save, each in a file of its own, with what was applied to them.",
                ),
                io.String.Input(
                    "overrides",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Other types for some weights, one PATTERN=TYPE in a line: img_mod=Q8_0 gives every weight "
                    "whose name contains img_mod the type Q8_0. The pattern is a regular expression; the first line "
                    "that fits counts.",
                ),
                io.Combo.Input(
                    "device",
                    options=["auto", "cpu"],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Where quantising is done. auto takes an NVIDIA or AMD GPU and needs 1 GB of VRAM for it.",
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
        )

    @classmethod
    def validate_inputs(cls, overrides: str | None = None) -> bool | str:
        try:
            parse_overrides((overrides or "").splitlines())
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        filename: str,
        quant_type: str,
        model: Any = None,
        clip: Any = None,
        overrides: str = "",
        device: str = "auto",
    ) -> io.NodeOutput:
        from ..loaders.model_weights import of_clip, of_model

        files = [*([of_model(model)] if model is not None else []), *(of_clip(clip) if clip is not None else [])]
        if not files:
            raise ValueError("there is nothing to save: connect a model, a clip, or both")
        paths = [_save(file, filename, quant_type, overrides, device) for file in files]
        return io.NodeOutput("\n".join(map(str, paths)), ui={"text": [str(path) for path in paths]})


def _save(file: NewFile, filename: str, quant_type: str, overrides: str, device: str) -> Path:
    from ..loaders.progress import Progress
    from ..loaders.save_model import save_model

    where = comfy.model_management.get_torch_device()
    if device == "cpu" or where.type not in DEVICES:
        where = CPU
    else:
        comfy.model_management.free_memory(WORKSPACE_BYTES, where)
    path = _new_path(file, filename, quant_type)
    progress = Progress(f"saving {path.name}", sum(prod(weight.shape) for weight in file.weights), _weights, 0)
    saved = save_model(
        path,
        file.weights,
        quant_type,
        file.architecture,
        overrides=parse_overrides(overrides.splitlines()),
        metadata=file.metadata,
        device=where,
        progress=lambda done, total: progress.at(done),
        sources=file.sources,
    )
    progress.end()
    return saved.path


def _weights(number: float) -> str:
    return f"{number / 1e6:.1f} million weights"


def _new_path(file: NewFile, filename: str, quant_type: str) -> Path:
    """A name that no file has yet, as the host numbers what it saves."""
    name = "-".join(part for part in (filename, file.part, quant_type) if part)
    folder, stem, counter, _, _ = folder_paths.get_save_image_path(
        f"{file.folder}/{name}", folder_paths.get_output_directory()
    )
    return Path(folder, f"{stem}_{counter:05}_.gguf")
