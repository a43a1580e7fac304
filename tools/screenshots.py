"""The pictures of the demo and of the live view in docs/: `python dev.py screenshots`.

The demo and a model of FLUX.1's shape, one sixth as wide and with random weights, which streams within a budget of
half its size, run in a real ComfyUI; the pictures are what a browser shows meanwhile. A picture carries a stamp of what
it shows, and a test fails when that has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from . import demo, locales, workflow
from .browser import Tab, browser
from .host import ROOT, Host, find
from .server import Server

DOCS = ROOT / "docs"
AT_MOST = 150_000  # bytes of a picture
COLOURS = 256
SIZE = (1360, 860)
DEMO_SIZE = (1360, 690)
DEMO_LORA = ROOT / "example_workflows" / "sluice_demo_lora.json"
CSS = ROOT / "web" / "css" / "live_view.css"
STAMP = "shows"  # the PNGs' field, as of the other pictures (pictures.py)
PANEL_HEIGHT = 1180
THEMES: tuple[Literal["dark", "light"], ...] = ("dark", "light")

WIDE = "wide_flux-Q8_0.gguf"
BUDGET_GB = 0.2
STEPS = 8
# Runs inside the host, which knows the architecture. Its text is as wide as what the demo's text encoder gives.
MAKE_WIDE = """
import sys, torch
import comfy.cli_args
comfy.cli_args.args.cpu = True
import comfy.ops
from comfy.ldm.flux.model import Flux
from safetensors.torch import save_file
with torch.device("meta"):
    network = Flux(image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=2048,
        context_in_dim=4096, hidden_size=512, mlp_ratio=4.0, num_heads=4, depth=19, depth_single_blocks=38,
        axes_dim=[16, 56, 56], theta=10000, txt_ids_dims=[], qkv_bias=True, guidance_embed=True, dtype=torch.bfloat16,
        operations=comfy.ops.disable_weight_init)
torch.manual_seed(0)
shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
save_file({name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shapes.items()}, sys.argv[1])
"""
# Move the graph to the right of the panel, or of the sidebar.
BESIDE_THE_PANEL = """() => {
    const { ds, canvas } = app.canvas;
    const panel = document.querySelector(".sluice-live");
    const [left, top] = [panel ? panel.getBoundingClientRect().right + 40 : 90, 130];
    const [right, bottom] = [canvas.clientWidth - 30, canvas.clientHeight - 90];
    const nodes = app.graph._nodes.map((node) => [...node.pos, node.pos[0] + node.size[0], node.pos[1] + node.size[1]]);
    const [x, y] = [0, 1].map((i) => Math.min(...nodes.map((box) => box[i])));
    const [width, height] = [Math.max(...nodes.map((box) => box[2])) - x, Math.max(...nodes.map((box) => box[3])) - y];
    ds.scale = Math.min((right - left) / width, (bottom - top) / height);
    ds.offset[0] = left / ds.scale - x;
    ds.offset[1] = top / ds.scale - y;
    app.canvas.setDirty(true, true);
}"""
SAMPLED = "(step) => document.querySelector('.sl-progress')?.value >= step"
OPEN = ".sluice-tab-button"
NOTHING_OVER_THE_GRAPH = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}


def run() -> None:
    """Take every picture anew."""
    host = find()
    demo.prepare_models(host)
    with tempfile.TemporaryDirectory() as base, Server(host, Path(base), "--cpu") as server, browser() as running:
        demo.copy_models(server.models_dir)
        make_wide(host, server.models_dir / "diffusion_models")
        pictures = {"demo_workflow.png": demo_in_the_window(running, server)}
        pictures["live_view.png"] = demo_with_the_panel(running, server)
        panels = [panel(running, server, theme) for theme in THEMES]
        pictures["live_view_streaming.png"] = beside(panels)
        stamps = stamps_of(server.object_info())
    for name, png in pictures.items():
        small = reduced(png, stamps[name])
        if len(small) > AT_MOST:
            raise ValueError(f"{name} has {len(small)} bytes, more than {AT_MOST}")
        (DOCS / name).write_bytes(small)
        print(f"{DOCS / name}  {len(small) / 1000:.0f} kB")


def make_wide(host: Host, folder: Path) -> None:
    """Write the model that streams."""
    plain = folder / "wide.safetensors"
    host.run_script(MAKE_WIDE, str(plain))
    host.run_script(ROOT / "tools" / "to_gguf.py", str(plain), str(folder / WIDE), "--type", "Q8_0", "--arch", "flux")
    plain.unlink()


def stamps_of(nodes: Mapping[str, Any]) -> dict[str, str]:
    """What each picture shows, in short: workflows, their nodes (of `/object_info`), the panel's words and looks."""
    words = json.dumps(locales.load(locales.SOURCE, locales.MAIN_FILE)[locales.OURS]).encode()
    looks = words + CSS.read_bytes()
    shown = {
        "demo_workflow.png": _drawn(demo.WORKFLOW, nodes),
        "live_view.png": _drawn(DEMO_LORA, nodes) + looks,
        "live_view_streaming.png": looks,
    }
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in shown.items()}


def _drawn(path: Path, nodes: Mapping[str, Any]) -> bytes:
    """A workflow, and the names of our nodes' inputs, which the frontend draws as the server has them."""
    ours = sorted({node["type"] for node in workflow.load(path)["nodes"]} & locales.ours(nodes).keys())
    return path.read_bytes() + json.dumps([nodes[key]["input_order"] for key in ours]).encode()


def demo_in_the_window(running: Any, server: Server) -> bytes:
    """The frontend with the demo in it, after a picture was drawn."""
    return _drawn_in(running, server, demo.WORKFLOW, DEMO_SIZE, with_panel=False)


def demo_with_the_panel(running: Any, server: Server) -> bytes:
    """The same with a LoRA, and the panel beside it."""
    return _drawn_in(running, server, DEMO_LORA, SIZE, with_panel=True)


def _drawn_in(running: Any, server: Server, file: Path, size: tuple[int, int], *, with_panel: bool) -> bytes:
    server.post("/free", {"unload_models": True, "free_memory": True})  # that every stage is to be seen
    tab = Tab.open(running, server, width=size[0], height=size[1], settings=NOTHING_OVER_THE_GRAPH)
    tab.drop(file)
    if with_panel:
        tab.page.locator(OPEN).click()
        tab.page.wait_for_selector(".sluice-live h2")
    tab.page.evaluate(BESIDE_THE_PANEL)
    tab.page.keyboard.press("Control+Enter")
    tab.page.wait_for_function("app.graph._nodes.some((node) => node.imgs?.length)", timeout=120_000)
    tab.page.wait_for_timeout(5000)  # in which the frontend tells that the job is done, and takes that back
    tab.page.get_by_text("Job completed").wait_for(state="hidden")
    png = tab.page.screenshot()
    tab.close()
    return png


def panel(running: Any, server: Server, theme: Literal["dark", "light"]) -> bytes:
    """The panel while the wide model samples."""
    tab = Tab.open(running, server, theme=theme, width=SIZE[0], height=PANEL_HEIGHT)
    tab.page.locator(OPEN).click()
    tab.page.wait_for_selector(".sluice-live h2")
    api = workflow.to_api(workflow.load(demo.WORKFLOW))
    api["1"]["inputs"] |= {"model_name": WIDE, "block_swap": ["20", 0]}
    api["6"]["inputs"] |= {"steps": STEPS, "seed": THEMES.index(theme)}
    api["20"] = {"class_type": "SluiceBlockSwapConfig", "inputs": {"vram_budget_gb": BUDGET_GB}}
    server.post("/prompt", {"prompt": api})
    tab.page.wait_for_function(SAMPLED, arg=STEPS // 2, timeout=300_000)
    tab.page.locator("details:visible").first.click()
    tab.page.wait_for_selector(".sl-block[data-current]")
    box = tab.page.locator(".sluice-live").bounding_box()
    assert box is not None
    clip = {"x": box["x"], "y": box["y"], "width": box["width"], "height": PANEL_HEIGHT - box["y"]}
    png = tab.page.screenshot(clip=clip)  # type: ignore[arg-type]
    tab.page.wait_for_function("document.querySelector('.sl-stage-now').textContent === 'Idle'", timeout=300_000)
    tab.close()
    return png


def beside(pictures: list[bytes]) -> bytes:
    """One picture of several of the same height."""
    from PIL import Image

    opened = [Image.open(io.BytesIO(one)).convert("RGB") for one in pictures]
    joined = Image.new("RGB", (sum(one.width for one in opened), opened[0].height))
    for index, one in enumerate(opened):
        joined.paste(one, (sum(before.width for before in opened[:index]), 0))
    data = io.BytesIO()
    joined.save(data, "png")
    return data.getvalue()


def reduced(png: bytes, stamp: str) -> bytes:
    """The same with few colours, which a frontend has anyway."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    data, said = io.BytesIO(), PngInfo()
    said.add_text(STAMP, stamp)
    small = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, kmeans=1, dither=Image.Dither.NONE)
    small.save(data, "png", optimize=True, pnginfo=said)
    return data.getvalue()
