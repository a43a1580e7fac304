"""ComfyUI-Sluice: GGUF diffusion models, loaded without a copy in RAM and dequantised at memory speed."""

from comfy_api.latest import ComfyExtension, io

WEB_DIRECTORY = "./web"


class SluiceExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .nodes.load_diffusion_model import LoadDiffusionModel

        return [LoadDiffusionModel]


async def comfy_entrypoint() -> SluiceExtension:
    return SluiceExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
