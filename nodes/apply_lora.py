"""LoRA file onto MODEL and CLIP. What applies it is imported when it is used: ComfyUI starts the faster."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io, ui

from ..lora.cache import AdapterCache
from . import model_files

FOLDERS = "sluice_loras"
MODES = ["auto", "runtime", "merge"]
CACHE = AdapterCache(bound_bytes=1 << 30)

STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}


class ApplyLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SluiceLoraLoader",
            display_name="Apply LoRA",
            category="Sluice",
            description="Applies a LoRA to a model and, if you like, to its text encoder. On a GGUF model the weights "
            "stay quantised as they are; on any other this is ComfyUI's own Load LoRA.",
            search_aliases=["lora", "load lora", "lora loader", "gguf lora"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL. Several LoRAs: one node after the other."),
                io.Combo.Input(
                    "lora_name",
                    options=model_files.names(FOLDERS),
                    tooltip="A .safetensors or .gguf file in models/loras. Press R after adding a file.",
                ),
                io.Float.Input(
                    "strength_model",
                    **STRENGTH,
                    tooltip="How strongly the LoRA changes the model. May be negative; 0 leaves the model as it is.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, for LoRAs that change it, too."),
                io.Float.Input(
                    "strength_clip",
                    **STRENGTH,
                    optional=True,
                    tooltip="How strongly the LoRA changes the text encoder. Does nothing where clip is not connected.",
                ),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default="auto",
                    advanced=True,
                    optional=True,
                    tooltip="How a LoRA on quantised weights is computed: runtime beside each weight, merge into the "
                    "weight while it is in use, auto whichever costs less. The pictures differ by rounding only.",
                ),
            ],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        # A name that another node supplies is not known yet, and so None; execute() looks for the file.
        try:
            if lora_name is not None:
                model_files.find(FOLDERS, lora_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> str:
        # Which file a linked name will be is not known yet, so a change of any of them counts.
        names = model_files.names(FOLDERS) if lora_name is None else [lora_name]
        return "; ".join(model_files.stamp(FOLDERS, name) for name in names)

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength_model: float = 1.0,
        clip: Any = None,
        strength_clip: float = 1.0,
        mode: str = "auto",
    ) -> io.NodeOutput:
        from ..loaders.progress import watched
        from ..lora.apply import apply, expect_rank

        if strength_model == 0 and (clip is None or strength_clip == 0):
            return io.NodeOutput(model, clip)
        folded = strength_model != 0 and mode != "runtime"
        rank_known = partial(expect_rank, model) if folded else None
        adapter = CACHE.get(model_files.find(FOLDERS, lora_name), rank_known, watched)
        applied = apply(adapter, model, clip, strength_model, strength_clip, mode)
        told = ui.PreviewText(applied.warning) if applied.warning else None
        return io.NodeOutput(applied.model, applied.clip, ui=told)
