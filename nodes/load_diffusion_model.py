"""GGUF file -> MODEL. What loads and streams it is imported when it is used: ComfyUI starts the faster."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..offload.costs import SwapRequest
from . import model_files, settings
from .block_swap import BlockSwap

FOLDERS = "sluice_diffusion_models"
COMPUTE_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class LoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SluiceDiffusionModelLoader",
            display_name="Load Diffusion Model (GGUF)",
            category="Sluice",
            description="Loads a diffusion model from a GGUF file without copying it into RAM. Works like Load "
            "Diffusion Model, for every architecture that this ComfyUI knows and every quant type.",
            search_aliases=["gguf", "unet loader gguf", "quantized model"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_files.names(FOLDERS),
                    tooltip="A .gguf file in models/diffusion_models or models/unet. Of a model that is split into "
                    "several files, the first one stands for all. Press R after adding a file.",
                ),
                BlockSwap.Input(
                    "block_swap",
                    optional=True,
                    tooltip="From Block Swap Config: how much VRAM the weights may take. Without it they take what is "
                    "free, and what does not fit streams while the model computes.",
                ),
                io.Combo.Input(
                    "compute_dtype",
                    options=list(COMPUTE_DTYPES),
                    default="auto",
                    advanced=True,
                    optional=True,
                    tooltip="The number format that the model computes in. auto leaves it to ComfyUI, which knows what "
                    "suits the model and your GPU. Change it only when pictures come out black or noisy.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        # A name that another node supplies is not known yet, and so None; execute() looks for the file.
        try:
            if model_name is not None:
                model_files.find(FOLDERS, model_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None, **others: object) -> str:
        from ..offload.attach import default_request
        from ..offload.unified import mode

        # Which file a linked name will be is not known yet, so a change of any of them counts.
        names = model_files.names(FOLDERS) if model_name is None else [model_name]
        stamps = [model_files.stamp(FOLDERS, name) for name in names]
        return "; ".join([*stamps, str(default_request(settings.current().swap_request())), mode()])

    @classmethod
    def execute(
        cls, model_name: str, block_swap: SwapRequest | None = None, compute_dtype: str = "auto"
    ) -> io.NodeOutput:
        from ..loaders.diffusion import load_diffusion_model
        from ..offload.attach import can_stream, default_request, stream
        from ..offload.attach_arrival import arriving
        from ..offload.attach_unified import use_in_place, wanted

        path, dtype = model_files.find(FOLDERS, model_name), COMPUTE_DTYPES[compute_dtype]
        if block_swap is None and wanted()[0]:
            return io.NodeOutput(use_in_place(load_diffusion_model(path, dtype, disable_dynamic=True)))
        request = block_swap or default_request(settings.current().swap_request())
        model = load_diffusion_model(path, dtype, disable_dynamic=request is not None)
        if request is None or (block_swap is None and not can_stream(model)):
            return io.NodeOutput(arriving(model))
        return io.NodeOutput(stream(model, request))
