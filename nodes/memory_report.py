"""Where the bytes are, at this point of the workflow."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from .report.reporter import REPORTER

log = logging.getLogger("sluice.report")


class MemoryReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.MatchType.Template("anything")
        return io.Schema(
            node_id="SluiceMemoryReport",
            display_name="Memory Report",
            category="Sluice",
            description="Tells where the bytes of every loaded model are, what the last step cost, and what VRAM and "
            "RAM did over the prompt, when what is connected passes through.",
            search_aliases=["vram", "ram", "memory usage", "debug", "show vram"],
            is_output_node=True,
            inputs=[
                io.MatchType.Input(
                    "anything",
                    template=template,
                    tooltip="Whatever passes through, unchanged: a LATENT after the sampler tells of the sampling, an "
                    "IMAGE after the VAE of the whole prompt.",
                ),
                io.String.Input(
                    "label",
                    default="",
                    optional=True,
                    tooltip="What to call this moment, in the text and on the plot.",
                ),
            ],
            outputs=[
                io.MatchType.Output(template=template, display_name="anything"),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="plot"),
            ],
        )

    @classmethod
    def execute(cls, anything: Any, label: str = "") -> io.NodeOutput:
        from .report.plot import plot
        from .report.text import text

        REPORTER.timeline.mark(label=label or "report")
        report = REPORTER.report()
        told, picture = text(report, label), plot(report["timeline"], label)
        log.info("%s", told)
        shown = {**ui.PreviewText(told).as_dict(), **ui.PreviewImage(picture, cls=cls).as_dict(), "sluice": [report]}
        return io.NodeOutput(anything, told, picture, ui=shown)
