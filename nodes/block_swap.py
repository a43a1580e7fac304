"""Block Swap: models larger than VRAM, streamed block by block. What streams is imported when it is used."""

from __future__ import annotations

from comfy_api.latest import io

from ..offload.costs import RANGES, SOURCES, SwapRequest

BlockSwap = io.Custom("SLUICE_BLOCK_SWAP")


def _range(dial: str) -> dict[str, float]:
    low, high, _ = RANGES[dial]
    return {"min": low, "max": high, "default": getattr(SwapRequest(), dial)}


class BlockSwapConfig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SluiceBlockSwapConfig",
            display_name="Block Swap Config",
            category="Sluice",
            description="How much of your GPU's memory a model's weights may take. What does not fit streams from the "
            "file while the model computes. The defaults are right for almost everybody.",
            search_aliases=["offload", "low vram", "block swap", "blocks_to_swap", "virtual vram"],
            inputs=[
                io.Float.Input(
                    "vram_budget_gb",
                    **_range("vram_budget_gb"),
                    step=0.1,
                    round=0.001,
                    tooltip="VRAM for the model's weights, in GB of 10^9 bytes. 0 takes what is free after ComfyUI's "
                    "estimate of what a step needs. Choose a number to leave more room for large images or other "
                    "programs.",
                ),
                io.Int.Input(
                    "blocks_to_swap",
                    **_range("blocks_to_swap"),
                    advanced=True,
                    optional=True,
                    tooltip="Stream this many whole blocks, whatever fits. -1 streams what is fastest within the "
                    "budget, tensor by tensor, which is never slower.",
                ),
                io.Int.Input(
                    "prefetch_blocks",
                    **_range("prefetch_blocks"),
                    advanced=True,
                    optional=True,
                    tooltip="How many streamed blocks lie ready beside the one that computes, at least. 1 is enough "
                    "almost always; 0 needs the least VRAM and is slower.",
                ),
                io.Float.Input(
                    "min_free_vram_gb",
                    **_range("min_free_vram_gb"),
                    step=0.1,
                    round=0.001,
                    advanced=True,
                    optional=True,
                    tooltip="VRAM to leave free, in GB, for other programs and for what torch cannot use. Choose more "
                    "if you run out of memory all the same.",
                ),
                io.Combo.Input(
                    "weight_source",
                    options=list(SOURCES),
                    default=SwapRequest().weight_source,
                    advanced=True,
                    optional=True,
                    tooltip="Where streamed weights come from. auto takes the first that works: page_cache reads the "
                    "system's cache of the file and needs no RAM of its own; pinned copies the weights to locked RAM; "
                    "disk reads them at every step.",
                ),
                io.Boolean.Input(
                    "offload_embeddings",
                    default=SwapRequest().offload_embeddings,
                    advanced=True,
                    optional=True,
                    tooltip="Leave embedding tables in RAM and copy only the rows that are used. Saves VRAM in models "
                    "with large tables; most diffusion models have none.",
                ),
            ],
            outputs=[BlockSwap.Output(display_name="block_swap")],
        )

    @classmethod
    def execute(cls, **dials: float | str | bool) -> io.NodeOutput:
        return io.NodeOutput(SwapRequest(**dials))  # type: ignore[arg-type]


class ApplyBlockSwap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SluiceApplyBlockSwap",
            display_name="Apply Block Swap",
            category="Sluice",
            description="Runs any diffusion model within a VRAM budget: what does not fit streams block by block while "
            "the model computes. LoRAs may be applied before or after.",
            search_aliases=["offload", "low vram", "block swap"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL, from this pack's loader or another."),
                BlockSwap.Input("block_swap", tooltip="From Block Swap Config."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: object, block_swap: SwapRequest) -> io.NodeOutput:
        from ..offload.attach import apply_block_swap

        return io.NodeOutput(apply_block_swap(model, block_swap))  # type: ignore[arg-type]
