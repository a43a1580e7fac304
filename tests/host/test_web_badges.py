"""The badges of loader nodes in a real browser, and `GET /sluice/file`, from which they have what they say."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
from typing import TYPE_CHECKING

import builders
import pytest
from pack.nodes.report.text import size
from pack.tools import demo
from pack.tools.browser import Tab
from pack.tools.host import ROOT
from pack.tools.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

FILE = demo.GGUF_FILES["Q8_0"]


def badges(tab: Tab) -> dict[str, str]:
    """The text of each node that wears a badge, by the node's type."""
    return tab.page.evaluate(
        """() => Object.fromEntries(app.graph._nodes.flatMap((node) => node.badges
            .map((badge) => (typeof badge === "function" ? badge() : badge).text)
            .filter((text) => text).map((text) => [node.type, text])))"""
    )


def file_route(folder: str, name: str) -> str:
    return f"/sluice/file?{urllib.parse.urlencode({'folder': folder, 'name': name})}"


def wait_for_badge(tab: Tab, part: str) -> None:
    tab.page.wait_for_function(
        "(part) => app.graph._nodes.some((node) => node.badges.some((badge) => badge.text?.includes(part)))", arg=part
    )


def test_a_badge_says_what_the_file_is(chromium: Browser, demo_server: Server) -> None:
    tab = Tab.open(chromium, demo_server)
    tab.drop(ROOT / "example_workflows" / "sluice_demo_lora.json")
    wait_for_badge(tab, "Q8_0")
    wait_for_badge(tab, "F16")
    said = demo_server.get(file_route("diffusion_models", FILE))
    assert said["bytes"] == (demo_server.models_dir / "diffusion_models" / FILE).stat().st_size
    assert said["architecture"] == "sd3" and list(said["quant_types"]) == ["Q8_0", "BF16"]
    lora = demo_server.get(file_route("loras", "demo_lora.safetensors"))
    assert badges(tab) == {
        "SluiceDiffusionModelLoader": f"{size(said['bytes'])} · Q8_0 99 %, BF16 1 % · sd3",
        "SluiceLoraLoader": f"{size(lora['bytes'])} · F16 100 %",
    }
    tab.page.evaluate("() => app.graph.add(LiteGraph.createNode('SluiceCLIPLoader'))")
    wait_for_badge(tab, "247.3 MB · F16 100 %")
    broken = demo_server.models_dir / "diffusion_models" / "broken.gguf"
    broken.write_bytes(b"GGUF, but not really")
    try:
        q4 = demo.GGUF_FILES["Q4_0"]
        for name, expected in ((q4, "Q4_0"), ("broken.gguf", "cannot be read"), ("gone.gguf", "file not found")):
            tab.page.evaluate(
                """(name) => {
                    const node = app.graph._nodes.find((node) => node.type === "SluiceDiffusionModelLoader");
                    const widget = node.widgets.find((widget) => widget.name === "model_name");
                    widget.value = name;
                    widget.callback(name);
                }""",
                name,
            )
            wait_for_badge(tab, expected)
    finally:
        broken.unlink()
        tab.close()


def test_nodes_that_vue_draws_wear_it_too(chromium: Browser, demo_server: Server) -> None:
    opened = Tab.open(chromium, demo_server, settings={"Comfy.VueNodes.Enabled": True})
    try:
        opened.drop(demo.WORKFLOW)
        opened.page.get_by_text(re.compile(r"11\.3 MB · Q8_0 99 %")).wait_for()
    finally:
        demo_server.post("/settings", {"Comfy.VueNodes.Enabled": False})
        opened.close()


@pytest.mark.parametrize(
    ("folder", "name", "status"),
    [
        ("diffusion_models", "../../server.log", 404),
        ("diffusion_models", "no such file.gguf", 404),
        ("text_encoders", demo.TEXT_ENCODER, 404),
        ("checkpoints", FILE, 404),
        ("", "", 404),
        ("diffusion_models", "short.gguf", 422),
    ],
)
def test_the_route_tells_of_listed_files_only(demo_server: Server, folder: str, name: str, status: int) -> None:
    short = demo_server.models_dir / "diffusion_models" / "short.gguf"
    short.write_bytes((demo_server.models_dir / "diffusion_models" / FILE).read_bytes()[:2000])
    try:
        with pytest.raises(urllib.error.HTTPError) as refused:
            demo_server.get(file_route(folder, name))
    finally:
        short.unlink()
    assert refused.value.code == status
    said = json.loads(refused.value.read())["error"]
    assert said and str(demo_server.base) not in said


@pytest.mark.parametrize("subfolder", ["", "sub/folder/"])
def test_an_error_names_no_folder_above_the_models(demo_server: Server, subfolder: str) -> None:
    """A missing part's error does, for whoever loads the model: here it is told by the name that the loader shows."""
    folder = demo_server.models_dir / "diffusion_models"
    name = f"{subfolder}split-00001-of-00002.gguf"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(builders.gguf_bytes(builders.split_keys(0, 2, 1)))
    try:
        with pytest.raises(urllib.error.HTTPError) as refused:
            demo_server.get(file_route("diffusion_models", name))
    finally:
        (folder / name).unlink()
    said = json.loads(refused.value.read())["error"]
    assert refused.value.code == 422
    assert f"split-00002-of-00002.gguf, is missing from diffusion_models/{subfolder}".rstrip("/") + ";" in said
    assert str(demo_server.base) not in said
