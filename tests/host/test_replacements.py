"""Workflows that were saved with other packs' nodes run on ours: by the server for scripts, and as the browser does it.

The workflows are made by hand: the demo's, with the nodes that another pack saves in place of its loaders. None of
those packs is installed here, except where a test puts one there.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack.tools import demo, host, workflow
from pack.tools.server import PromptFailed, Server
from pack.tools.steps import SetupError
from pack.tools.versions import HOSTS, MAIN_HOST
from PIL import Image

MODEL = demo.GGUF_FILES["Q8_0"]
ENCODER = Path(demo.TEXT_ENCODER).name

DISTORCH = {
    **{"compute_device": "cuda:0", "virtual_vram_gb": 4.0, "donor_device": "cpu"},
    **{"expert_mode_allocations": "", "eject_models": True},
}
ADVANCED = {"unet_name": MODEL, "dequant_dtype": "float32", "patch_dtype": "target", "patch_on_device": False}
FILES = {f"clip_name{number}": ENCODER for number in range(1, 5)}
PAIR, TRIPLE = ({name: FILES[name] for name in list(FILES)[:count]} for count in (2, 3))
SWAP = {
    **{"blocks_to_swap": 20, "offload_img_emb": False, "offload_txt_emb": True, "use_non_blocking": True},
    **{"vace_blocks_to_swap": 3, "prefetch_blocks": 1, "block_swap_debug": False},
}
WAN_LOADER = {
    **{"model": MODEL, "base_precision": "bf16", "quantization": "disabled", "load_device": "offload_device"},
    **{"attention_mode": "sdpa", "rms_norm_function": "default"},
}

# Each pack's node as it is saved: its widgets in order.
DIFFUSION: dict[str, dict[str, Any]] = {
    "UnetLoaderGGUF": {"unet_name": MODEL},
    "UnetLoaderGGUFAdvanced": ADVANCED,
    "UnetLoaderGGUFMultiGPU": {"unet_name": MODEL, "device": "cuda:1"},
    "UnetLoaderGGUFAdvancedMultiGPU": {**ADVANCED, "device": "cuda:1"},
    "UnetLoaderGGUFDisTorch2MultiGPU": {"unet_name": MODEL, **DISTORCH},
    "UnetLoaderGGUFAdvancedDisTorch2MultiGPU": {**ADVANCED, **DISTORCH},
    "UnetLoaderGGUFDisTorchMultiGPU": {"unet_name": MODEL, "device": "cuda:0", "virtual_vram_gb": 4.0},
    "UnetLoaderGGUFDynamicVRAM": {"unet_name": MODEL},
    "GGUFLoaderKJ": {"model_name": MODEL, "extra_model_name": "none", "dequant_dtype": "default"},
}
TEXT: dict[str, dict[str, Any]] = {
    "CLIPLoaderGGUF": {"clip_name": ENCODER, "type": "sd3"},
    "CLIPLoaderGGUFMultiGPU": {"clip_name": ENCODER, "type": "sd3", "device": "cuda:1"},
    "CLIPLoaderGGUFDisTorch2MultiGPU": {"clip_name": ENCODER, "type": "sd3", "device": "cuda:0", "eject_models": False},
    "CLIPLoaderMultiGPU": {"clip_name": ENCODER, "type": "sd3", "device": "cuda:1"},
    "CLIPLoaderDisTorch2MultiGPU": {"clip_name": ENCODER, "type": "sd3", "device": "cuda:0", "virtual_vram_gb": 4.0},
}

# What a node becomes, without the inputs that are the new node's defaults.
BECOMES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "DualCLIPLoaderGGUF": ({**PAIR, "type": "flux"}, "SluiceCLIPLoader", {**PAIR, "type": "flux"}),
    "DualCLIPLoaderGGUFMultiGPU": (
        {**PAIR, "type": "sdxl", "device": "cpu"},
        "SluiceCLIPLoader",
        {**PAIR, "type": "sdxl"},
    ),
    "TripleCLIPLoaderGGUF": (TRIPLE, "SluiceCLIPLoader", {**TRIPLE, "type": "sd3"}),
    "QuadrupleCLIPLoaderGGUF": (FILES, "SluiceCLIPLoader", {**FILES, "type": "hidream"}),
    "QuadrupleCLIPLoaderGGUFDisTorch2MultiGPU": (
        {**FILES, **DISTORCH},
        "SluiceCLIPLoader",
        {**FILES, "type": "hidream"},
    ),
    "VAELoaderMultiGPU": (
        {"vae_name": "ae.safetensors", "device": "cuda:1"},
        "VAELoader",
        {"vae_name": "ae.safetensors"},
    ),
    "UNETLoaderDisTorch2MultiGPU": (
        {"unet_name": "flux1-dev.safetensors", "weight_dtype": "fp8_e4m3fn", **DISTORCH},
        "UNETLoader",
        {"unet_name": "flux1-dev.safetensors", "weight_dtype": "fp8_e4m3fn"},
    ),
    "WanVideoBlockSwap": (
        SWAP,
        "SluiceBlockSwapConfig",
        {"vram_budget_gb": 0.0, "blocks_to_swap": 20, "prefetch_blocks": 1, "offload_embeddings": True},
    ),
}

Graph = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def reference(demo_server: Server) -> np.ndarray:
    return picture(demo_server, workflow.to_api(short_demo()))


@pytest.fixture(scope="module")
def replacements(server: Server) -> dict[str, Any]:
    return {old: found[0] for old, found in server.get("/node_replacements").items()}


def short_demo() -> dict[str, Any]:
    saved, _ = demo.prompt_for("red seven on white", MODEL)
    workflow.set_widget(saved, "Sampler", "steps", 2)
    return saved


def put(saved: dict[str, Any], title: str, kind: str, widgets: dict[str, Any], **links: int | None) -> dict[str, Any]:
    """The workflow with the named node exchanged for one of another pack; `links` are numbers of links by input."""
    (node,) = [node for node in saved["nodes"] if node.get("title") == title]
    sockets = [{"name": name, "type": "*", "link": link} for name, link in links.items()]
    node["inputs"] = [*sockets, *({"name": name, "widget": {"name": name}, "link": None} for name in widgets)]
    node["type"], node["widgets_values"] = kind, list(widgets.values())
    return saved


def picture(server: Server, graph: Graph) -> np.ndarray:
    (png,) = server.images(server.queue(copy.deepcopy(graph)))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def opened(saved: dict[str, Any], replacements: dict[str, Any], nodes: dict[str, Any]) -> Graph:
    """The prompt of a saved workflow whose missing nodes were replaced as ComfyUI's frontend does it: old values by
    their place among `old_widget_ids`, links by the input's name, and outputs only where they are mapped."""
    graph = workflow.to_api(saved)
    for node in saved["nodes"]:
        found = replacements.get(node["type"])
        if found is None or node["type"] in nodes:
            continue
        values = dict(zip(found["old_widget_ids"], node["widgets_values"], strict=False))
        linked = {name: value for name, value in graph[str(node["id"])]["inputs"].items() if isinstance(value, list)}
        inputs = {}
        for mapping in found["input_mapping"]:
            if "set_value" in mapping:
                inputs[mapping["new_id"]] = mapping["set_value"]
            elif mapping["old_id"] in {**values, **linked}:
                inputs[mapping["new_id"]] = {**values, **linked}[mapping["old_id"]]
        used = {link[2] for link in saved["links"] if link[1] == node["id"]}
        assert used <= {mapping["old_idx"] for mapping in found["output_mapping"]}
        graph[str(node["id"])] = {"class_type": found["new_node_id"], "inputs": inputs}
    return graph


PAIRS = list(zip(DIFFUSION, itertools.cycle(TEXT), strict=False))  # each node of either kind, few pictures


@pytest.mark.parametrize("diffusion, text", PAIRS)
def test_the_picture_is_the_same(demo_server: Server, replacements, reference, diffusion: str, text: str) -> None:
    saved = put(short_demo(), "Model", diffusion, DIFFUSION[diffusion])
    saved = put(saved, "Text encoder", text, TEXT[text])
    assert (picture(demo_server, workflow.to_api(saved)) == reference).all()


@pytest.mark.parametrize("diffusion, text", PAIRS)
def test_the_browser_makes_the_same_of_it(demo_server: Server, replacements, diffusion: str, text: str) -> None:
    saved = put(short_demo(), "Model", diffusion, DIFFUSION[diffusion])
    graph = opened(put(saved, "Text encoder", text, TEXT[text]), replacements, demo_server.object_info())
    assert graph["1"] == {"class_type": "SluiceDiffusionModelLoader", "inputs": {"model_name": MODEL}}
    new, file = ("SluiceCLIPLoader", "clip_name1") if "GGUF" in text else ("CLIPLoader", "clip_name")
    assert graph["2"] == {"class_type": new, "inputs": {file: ENCODER, "type": "sd3"}}


@pytest.mark.parametrize("kind", BECOMES)
def test_values_arrive(server: Server, replacements, kind: str) -> None:
    widgets, new, expected = BECOMES[kind]
    saved = put(short_demo(), "Text encoder", kind, widgets)
    assert opened(saved, replacements, server.object_info())["2"] == {"class_type": new, "inputs": expected}


def test_every_replacement_fits_the_node_that_it_makes(server: Server, replacements) -> None:
    nodes = server.object_info()
    ours = {old: found for old, found in replacements.items() if old not in nodes and fits_the_pack(old)}
    assert len(ours) > 40
    for old, found in ours.items():
        node = nodes[found["new_node_id"]]
        required, optional = (node["input"].get(group, {}) for group in ("required", "optional"))
        given = {mapping["new_id"] for mapping in found["input_mapping"]}
        assert given <= {*required, *optional}, old
        assert set(required) <= given, old  # the server fills in no default
        assert len(found["output_mapping"]) == len(node["output"]), old


def fits_the_pack(old: str) -> bool:
    return any(word in old for word in ("GGUF", "MultiGPU", "DynamicVRAM", "WanVideo"))


def test_wan_block_swap_reaches_the_loader(demo_server: Server, replacements, reference) -> None:
    """Loader and block swap of WanVideoWrapper, linked as there; its sampler has no counterpart, core's takes over."""
    for given in (True, False):
        saved = put(short_demo(), "Model", "WanVideoModelLoader", WAN_LOADER, block_swap_args=10 if given else None)
        if given:
            saved["nodes"].append({"id": 10, "title": "Swap", "inputs": [], "outputs": []})
            saved["links"].append([10, 10, 0, 1, 0, "BLOCKSWAPARGS"])
            put(saved, "Swap", "WanVideoBlockSwap", {**SWAP, "blocks_to_swap": 2})
        assert (picture(demo_server, workflow.to_api(saved)) == reference).all()
        graph = opened(saved, replacements, demo_server.object_info())
        assert graph["1"]["inputs"].get("block_swap") == (["10", 0] if given else None)
        assert (picture(demo_server, graph) == reference).all()


@pytest.mark.parametrize("config, apply", [("10", "11"), ("11", "10"), ("20", "30"), ("31", "12")])
def test_wan_set_block_swap_reaches_the_model(demo_server: Server, reference, config: str, apply: str) -> None:
    """Under several numbers: the server replaces in the order of a set of them, and each order must do."""
    graph = workflow.to_api(short_demo())
    graph[config] = {"class_type": "WanVideoBlockSwap", "inputs": {**SWAP, "blocks_to_swap": 1}}
    linked = {"model": ["1", 0], "block_swap_args": [config, 0]}
    graph[apply] = {"class_type": "WanVideoSetBlockSwap", "inputs": linked}
    graph["6"]["inputs"]["model"] = [apply, 0]
    assert (picture(demo_server, graph) == reference).all()


def test_a_file_that_is_not_there_is_told_by_our_node(demo_server: Server) -> None:
    graph = workflow.to_api(put(short_demo(), "Model", "UnetLoaderGGUF", {"unet_name": "flux1-dev-Q4_K_S.gguf"}))
    with pytest.raises(PromptFailed, match=r"'flux1-dev-Q4_K_S\.gguf' is in none of the model folders"):
        demo_server.queue(graph)


OTHER_PACK = """
class UnetLoaderGGUF:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"unet_name": ("STRING",)}}
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = ("STRING",), "load", "bootleg", True

    def load(self, unet_name):
        return {"ui": {"text": ["the other pack loads " + unet_name]}, "result": (unet_name,)}

NODE_CLASS_MAPPINGS = {"UnetLoaderGGUF": UnetLoaderGGUF}
"""


@pytest.fixture(params=HOSTS)
def shared_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A server of each version, which has another pack with one of the ids, too."""
    try:
        found = host.find(request.param)
    except SetupError:
        if request.param != MAIN_HOST and host.named_by_environment():
            pytest.skip(f"ComfyUI {request.param} is not set up")
        raise
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "another_pack.py").write_text(OTHER_PACK)
    with Server(found, tmp_path, "--cpu") as running:
        yield running


def test_an_installed_pack_keeps_its_nodes_in_every_version(shared_server: Server) -> None:
    told = shared_server.queue({"1": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "a.gguf"}}})
    assert told["1"]["text"] == ["the other pack loads a.gguf"]
    # and what that pack lacks is still ours
    graph = {
        "1": {"class_type": "UnetLoaderGGUFAdvanced", "inputs": {"unet_name": "b.gguf"}},
        "2": {"class_type": "SluiceMemoryReport", "inputs": {"anything": ["1", 0], "label": ""}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}},
    }
    with pytest.raises(PromptFailed, match=r"'b\.gguf' is in none of the model folders"):
        shared_server.queue(graph)
