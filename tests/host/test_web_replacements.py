"""Workflows that were saved with another pack's nodes, opened in a real browser: the frontend offers to replace them,
its button makes them ours, values and links arrive, and the picture is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from host.test_replacements import (
    ADVANCED,
    DIFFUSION,
    ENCODER,
    MODEL,
    SWAP,
    TEXT,
    WAN_LOADER,
    picture,
    put,
    reference,  # noqa: F401  (a fixture)
    short_demo,
)
from host.test_web_badges import wait_for_badge
from pack.tools.browser import Tab
from pack.tools.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

Graph = dict[str, dict[str, Any]]
OURS = {"class_type": "SluiceDiffusionModelLoader", "inputs": {"model_name": MODEL, "compute_dtype": "auto"}}
NO_FILES = dict.fromkeys(("clip_name2", "clip_name3", "clip_name4"), "none")
TEXT_ENCODER = {
    "class_type": "SluiceCLIPLoader",
    "inputs": {"clip_name1": ENCODER, "type": "sd3", **NO_FILES, "device": "default"},
}


def of_comfyui_gguf() -> tuple[dict[str, Any], Graph]:
    saved = put(short_demo(), "Model", "UnetLoaderGGUFAdvanced", ADVANCED)
    return put(saved, "Text encoder", "CLIPLoaderGGUF", TEXT["CLIPLoaderGGUF"]), {"1": OURS, "2": TEXT_ENCODER}


def of_multigpu() -> tuple[dict[str, Any], Graph]:
    model, text = "UnetLoaderGGUFDisTorch2MultiGPU", "CLIPLoaderGGUFDisTorch2MultiGPU"
    saved = put(short_demo(), "Model", model, DIFFUSION[model])
    return put(saved, "Text encoder", text, TEXT[text]), {"1": OURS, "2": TEXT_ENCODER}


def of_wan_video_wrapper() -> tuple[dict[str, Any], Graph]:
    saved = put(short_demo(), "Model", "WanVideoModelLoader", WAN_LOADER, block_swap_args=10)
    output = {"name": "block_swap_args", "type": "BLOCKSWAPARGS", "links": [10]}
    node = {"id": 10, "title": "Swap", "pos": [0, 600], "size": [300, 200], "mode": 0, "flags": {}, "order": 0}
    saved["nodes"].append({**node, "properties": {}, "inputs": [], "outputs": [output]})
    saved["links"].append([10, 10, 0, 1, 0, "BLOCKSWAPARGS"])
    saved["last_node_id"] = saved["last_link_id"] = 10
    put(saved, "Swap", "WanVideoBlockSwap", {**SWAP, "blocks_to_swap": 2})
    config = {
        **{"vram_budget_gb": 0, "blocks_to_swap": 2, "prefetch_blocks": 1, "min_free_vram_gb": 0.5},
        **{"weight_source": "auto", "offload_embeddings": True},
    }
    loader = {**OURS, "inputs": {**OURS["inputs"], "block_swap": ["10", 0]}}  # type: ignore[dict-item]
    return saved, {"1": loader, "10": {"class_type": "SluiceBlockSwapConfig", "inputs": config}}


@pytest.mark.parametrize("pack", [of_comfyui_gguf, of_multigpu, of_wan_video_wrapper])
def test_it_is_replaced_and_runs(
    chromium: Browser,
    demo_server: Server,
    reference: np.ndarray,  # noqa: F811
    tmp_path: Path,
    pack: Any,
) -> None:
    saved, expected = pack()
    file = tmp_path / "old.json"
    file.write_text(json.dumps(saved), encoding="utf-8")
    tab = Tab.open(chromium, demo_server)
    tab.drop(file)
    tab.page.get_by_role("button", name="View details").click()
    tab.page.get_by_role("button", name="Replace All").click()
    old = {node["type"] for node in saved["nodes"]} - set(demo_server.object_info())
    tab.page.wait_for_function("(old) => !app.graph._nodes.some((node) => old.includes(node.type))", arg=sorted(old))
    wait_for_badge(tab, "Q8_0")
    graph: Graph = tab.page.evaluate("async () => (await app.graphToPrompt()).output")
    found = {number: {key: graph[number][key] for key in ("class_type", "inputs")} for number in expected}
    assert found == expected

    entry = tab.run_to_the_end(demo_server)
    assert entry["status"]["status_str"] == "success"
    assert (picture(demo_server, graph) == reference).all()
    assert tab.own_errors() == []
    tab.close()
