"""Nodes of other packs -> ours, for workflows that were saved with them.

ComfyUI replaces a node whose pack is not installed: the browser offers it when the workflow opens, the server does it
for prompts that scripts send. It copies values and sets constants, one node for one, and touches no node that exists.
So what has no counterpart is left at our default (docs/porting.md tells what and why):

- `device`, `compute_device`, donors and expert strings name GPUs; our loaders take the one that ComfyUI chose.
- `virtual_vram_gb` is what shall be outside of VRAM, of a file whose size the table cannot know. Without a budget our
  loader streams what does not fit, which is what that number was for.
- `dequant_dtype` and `patch_dtype` round weights on their way; ours are dequantised in float32 and rounded once, to
  what the model computes in. As `compute_dtype` they would change what the model computes in, which they never did.

Names and orders of widgets: city96/ComfyUI-GGUF 795e451, pollockjj/ComfyUI-MultiGPU 2.6.3,
kijai/ComfyUI-WanVideoWrapper 3317577, kijai/ComfyUI-KJNodes 3f20054.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import ComfyAPI, io

LOADER, CLIP, CONFIG, APPLY = (
    "SluiceDiffusionModelLoader",
    "SluiceCLIPLoader",
    "SluiceBlockSwapConfig",
    "SluiceApplyBlockSwap",
)


@dataclass(frozen=True)
class Replacement:
    """How one node becomes another.

    `widgets` are the old node's in the order in which workflows list their values, as far as one is copied.
    """

    new: str
    widgets: tuple[str, ...]
    copied: Mapping[str, str]  # the new node's input -> the old node's
    constants: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)  # old inputs that a prompt may lack -> what that means
    outputs: int = 1


def _same(new: str, *names: str, outputs: int = 1) -> Replacement:
    """A node whose inputs have the same names."""
    return Replacement(new, names, {name: name for name in names}, outputs=outputs)


def _clip(count: int, kind: str | None = None) -> Replacement:
    """A text encoder of several files, whose type is a widget unless `kind` is given."""
    files = tuple(f"clip_name{number}" for number in range(1, count + 1))
    if kind is None:
        return _same(CLIP, *files, "type")
    return Replacement(CLIP, files, {name: name for name in files}, {"type": kind})


GGUF = {
    "UnetLoaderGGUF": Replacement(LOADER, ("unet_name",), {"model_name": "unet_name"}),
    "UnetLoaderGGUFAdvanced": Replacement(LOADER, ("unet_name",), {"model_name": "unet_name"}),
    "CLIPLoaderGGUF": Replacement(CLIP, ("clip_name", "type"), {"clip_name1": "clip_name", "type": "type"}),
    "DualCLIPLoaderGGUF": _clip(2),
    "TripleCLIPLoaderGGUF": _clip(3, "sd3"),
    "QuadrupleCLIPLoaderGGUF": _clip(4, "hidream"),
}

# MultiGPU wraps core's loaders, too. Without it they are core's again.
CORE = {
    "UNETLoader": _same("UNETLoader", "unet_name", "weight_dtype"),
    "VAELoader": _same("VAELoader", "vae_name"),
    "CLIPLoader": _same("CLIPLoader", "clip_name", "type"),
    "DualCLIPLoader": _same("DualCLIPLoader", "clip_name1", "clip_name2", "type"),
    "TripleCLIPLoader": _same("TripleCLIPLoader", "clip_name1", "clip_name2", "clip_name3"),
    "QuadrupleCLIPLoader": _same("QuadrupleCLIPLoader", "clip_name1", "clip_name2", "clip_name3", "clip_name4"),
    "CLIPVisionLoader": _same("CLIPVisionLoader", "clip_name"),
    "ControlNetLoader": _same("ControlNetLoader", "control_net_name"),
    "CheckpointLoaderSimple": _same("CheckpointLoaderSimple", "ckpt_name", outputs=3),
}

# What the two packs and a fork of the first append to a loader's id; each adds widgets behind the loader's own.
WRAPPED = ("MultiGPU", "DisTorch2MultiGPU", "DisTorchMultiGPU")
FORKED = ("DynamicVRAM",)

SWAP = Replacement(
    CONFIG,
    (
        *("blocks_to_swap", "offload_img_emb", "offload_txt_emb", "use_non_blocking", "vace_blocks_to_swap"),
        "prefetch_blocks",
    ),
    {
        "blocks_to_swap": "blocks_to_swap",
        "prefetch_blocks": "prefetch_blocks",
        "offload_embeddings": "offload_txt_emb",
    },
    {"vram_budget_gb": 0.0},
    absent={"prefetch_blocks": 0, "offload_txt_emb": False},
)
WAN_LOADER = Replacement(
    LOADER, ("model",), {"model_name": "model", "block_swap": "block_swap_args"}, absent={"block_swap_args": None}
)
WAN = {
    "WanVideoBlockSwap": SWAP,
    "WanVideoBlockSwapMultiGPU": SWAP,
    "WanVideoSetBlockSwap": Replacement(
        APPLY, (), {"model": "model", "block_swap": "block_swap_args"}, absent={"block_swap_args": None}
    ),
    "WanVideoModelLoader": WAN_LOADER,
    "WanVideoModelLoaderMultiGPU": WAN_LOADER,
}

REPLACEMENTS: dict[str, Replacement] = {
    **GGUF,
    **{base + suffix: found for base, found in GGUF.items() for suffix in (*WRAPPED, *FORKED)},
    **{base + suffix: found for base, found in CORE.items() for suffix in WRAPPED},
    **WAN,
    "GGUFLoaderKJ": _same(LOADER, "model_name"),
}


class SameOutputs(io.NodeReplace):
    """Outputs keep their places. The browser has to be told, or it drops their links; the server takes it for granted,
    and told, it stops with a KeyError if the node that an output leads to was replaced before (0.18 to 0.30)."""

    def __init__(self, outputs: int, **described: Any) -> None:
        super().__init__(**described)
        self._outputs = outputs

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "output_mapping": [{"new_idx": i, "old_idx": i} for i in range(self._outputs)]}


def described() -> Iterator[io.NodeReplace]:
    """The table as the host takes it."""
    for old, found in REPLACEMENTS.items():
        copied = [{"new_id": new, "old_id": name} for new, name in found.copied.items()]
        constants = [{"new_id": new, "set_value": value} for new, value in found.constants.items()]
        yield SameOutputs(
            found.outputs,
            new_node_id=found.new,
            old_node_id=old,
            old_widget_ids=list(found.widgets),
            input_mapping=[*copied, *constants],
        )


def complete(request: dict[str, Any], installed: Container[str]) -> dict[str, Any]:
    """Give the nodes of a prompt what the host's replacement takes for granted and breaks without: a `_meta`, which
    only the browser writes, and every input that is copied, also one that is not connected or is newer than the file.

    Args:
        request: the body of `POST /prompt`, changed in place and returned.
        installed: the node ids that the host knows; they are not replaced, so not completed.
    """
    prompt = request.get("prompt")
    for node in prompt.values() if isinstance(prompt, dict) else ():
        kind = node.get("class_type") if isinstance(node, dict) else None
        if kind in REPLACEMENTS and kind not in installed:
            node.setdefault("_meta", {})
            node["inputs"] = {**REPLACEMENTS[kind].absent, **node.get("inputs", {})}
    return request


async def register() -> None:
    """Tell the running server, if there is one."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    api = ComfyAPI()
    for replacement in described():
        await api.node_replacement.register(replacement)
    installed = sys.modules["nodes"].NODE_CLASS_MAPPINGS
    server.add_on_prompt_handler(lambda request: complete(request, installed))
