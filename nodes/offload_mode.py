"""Offload Mode: who is in VRAM at which stage of a picture."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..offload.stages import CHOICES, ESTIMATES, MODES, StagePolicy

DEFAULTS = StagePolicy()


def _choice(name: str, tooltip: str, options: tuple[str, ...] = CHOICES) -> io.Combo.Input:
    default = getattr(DEFAULTS, name)
    return io.Combo.Input(name, options=list(options), default=default, optional=True, advanced=True, tooltip=tooltip)


class OffloadMode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SluiceOffloadMode",
            display_name="Offload Mode",
            category="Sluice",
            description="Decides which of text encoder, diffusion model and VAE are in VRAM at which stage of a "
            "picture. Except in aggressive, nothing moves unless the next stage needs the room.",
            search_aliases=["offload", "low vram", "unload", "vram", "stage"],
            inputs=[
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=DEFAULTS.mode,
                    tooltip="none: ComfyUI decides. cond_only: the text encoder leaves after the prompts are encoded. "
                    "cond_diffusion: the diffusion model leaves, too, before the VAE decodes. aggressive: each leaves "
                    "when its stage ends, needed or not. layer_streaming: as cond_diffusion, and the diffusion model "
                    "streams.",
                ),
                io.Model.Input("model", optional=True, tooltip="Any MODEL. LoRAs may come before or after this node."),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Any CLIP. Connect what encodes the prompts to this node's output."
                ),
                io.Vae.Input("vae", optional=True, tooltip="Any VAE. It tells when the picture is done."),
                _choice(
                    "offload_cond_stage",
                    "Whether the text encoder may leave VRAM: auto as the mode says, on also where the mode would not, "
                    "off never.",
                ),
                _choice(
                    "offload_diffusion",
                    "Whether the diffusion model may leave VRAM: auto as the mode says, on also where the mode would "
                    "not, off never.",
                ),
                _choice(
                    "reload_cond_stage",
                    "Whether the text encoder comes back after the picture: auto where there is room for all that "
                    "left, on where there is room for it, off only when it is used.",
                ),
                _choice(
                    "reload_diffusion",
                    "Whether the diffusion model comes back after the picture: auto where there is room for all that "
                    "left, on where there is room for it, off only when it is used.",
                ),
                _choice(
                    "vram_estimation",
                    "How to find out what VRAM the VAE will need: dryrun tries it once for each picture size, without "
                    "using memory; formula is ComfyUI's estimate.",
                    ESTIMATES,
                ),
                io.Float.Input(
                    "target_free_vram_gb",
                    default=DEFAULTS.target_free_vram_gb,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    round=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Make room until at least this much VRAM, in GB, is free when a stage begins. 0: as much "
                    "as the stage needs.",
                ),
                io.Boolean.Input(
                    "log_events",
                    default=DEFAULTS.log_events,
                    optional=True,
                    advanced=True,
                    tooltip="Write to ComfyUI's log what leaves VRAM and what comes back. Memory Report always "
                    "shows it.",
                ),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, model: Any = None, clip: Any = None, vae: Any = None, **dials: Any) -> io.NodeOutput:
        from ..offload.attach_stages import attach_stages  # late: ComfyUI starts the faster

        return io.NodeOutput(*attach_stages(StagePolicy(**dials), model, clip, vae))
