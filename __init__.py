"""ComfyUI-Sluice: GGUF diffusion models, loaded without a copy in RAM and dequantised at memory speed."""

from comfy_api.latest import ComfyExtension, io

WEB_DIRECTORY = "./web"


class SluiceExtension(ComfyExtension):
    async def on_load(self) -> None:
        from .nodes import replacements

        await replacements.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .nodes.apply_lora import ApplyLora
        from .nodes.block_swap import ApplyBlockSwap, BlockSwapConfig
        from .nodes.load_clip import LoadCLIP
        from .nodes.load_diffusion_model import LoadDiffusionModel
        from .nodes.memory_report import MemoryReport
        from .nodes.offload_mode import OffloadMode
        from .nodes.release_memory import ReleaseMemory
        from .nodes.report import reporter
        from .nodes.save_gguf import SaveGGUF

        reporter.serve()
        return [
            ApplyBlockSwap,
            ApplyLora,
            BlockSwapConfig,
            LoadCLIP,
            LoadDiffusionModel,
            MemoryReport,
            OffloadMode,
            ReleaseMemory,
            SaveGGUF,
        ]


async def comfy_entrypoint() -> SluiceExtension:
    return SluiceExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
