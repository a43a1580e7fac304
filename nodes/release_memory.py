"""Release Memory: a point of the workflow at which memory is given back."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..offload.stages import ALL, CACHES, HOW, WHAT
from . import apply_lora


class ReleaseMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        passed = io.MatchType.Template("passed")
        return io.Schema(
            node_id="SluiceReleaseMemory",
            display_name="Release Memory",
            category="Sluice",
            description="Gives memory back when the workflow gets here, and passes its input through, so that you "
            "decide when that is.",
            search_aliases=["unload", "free memory", "purge vram", "clear cache", "dispose"],
            inputs=[
                io.MatchType.Input("anything", template=passed, tooltip="Anything. It is passed through as it is."),
                io.Combo.Input(
                    "what",
                    options=list(WHAT),
                    default="text_encoder",
                    tooltip="What to release. caches: LoRA files that were read, the estimates of Offload Mode, and "
                    "memory that torch keeps for later. all: every model that ComfyUI has loaded, and the caches.",
                ),
                io.Combo.Input(
                    "how",
                    options=list(HOW),
                    default="offload",
                    tooltip="offload: give back VRAM and locked RAM. dispose: let go of the RAM, too, and close the "
                    "model's file; the next use opens it again.",
                ),
            ],
            outputs=[io.MatchType.Output(template=passed, display_name="passed")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # never the same: it runs whenever it is reached

    @classmethod
    def execute(cls, anything: Any, what: str, how: str) -> io.NodeOutput:
        from ..offload.release import release  # late: ComfyUI starts the faster

        if what in (CACHES, ALL):
            apply_lora.CACHE.clear()
        release(what, how)
        return io.NodeOutput(anything)
