"""The live view in the frontends that older ComfyUIs bring, and a pack without its `web/`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pack.tools import demo, host
from pack.tools.browser import Tab, browser
from pack.tools.host import ROOT
from pack.tools.server import Server
from pack.tools.versions import HOSTS, MAIN_HOST


@pytest.mark.browser
@pytest.mark.parametrize("version", [version for version in HOSTS if version != MAIN_HOST])
def test_it_works_in_the_frontend_of(tmp_path: Path, version: str) -> None:
    if host.named_by_environment():
        pytest.skip("only the ComfyUI that COMFYUI_PATH names is tested")
    with browser() as chromium, Server(host.find(version), tmp_path, "--cpu") as server:
        demo.prepare_models(host.find())
        demo.copy_models(server.models_dir)
        opened = Tab.open(chromium, server)
        opened.page.locator(".sluice-tab-button").click()
        opened.page.get_by_text("No model is loaded").wait_for()
        opened.drop(demo.WORKFLOW)
        opened.page.wait_for_function(
            "app.graph._nodes.some((node) => node.badges.some((badge) => / MB · Q8_0/.test(badge.text)))"
        )
        server.queue(demo.prompt_for("red seven on white", demo.GGUF_FILES["Q8_0"])[1])
        opened.page.wait_for_function("document.querySelectorAll('.sluice-live article').length === 3")
        opened.page.get_by_text("Idle").wait_for()
        names = opened.page.locator(".sluice-live article h3").all_inner_texts()
        assert sorted(names) == sorted(model["name"] for model in server.get("/sluice/report")["models"])
        opened.page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'fr')")
        opened.page.wait_for_selector(".sluice-live[lang=fr] article", timeout=60_000)
        assert opened.own_errors() == []
        opened.close()


def test_nothing_needs_the_web_folder(run_in_host, tmp_path: Path) -> None:
    pack = tmp_path / "ComfyUI-Sluice"
    folders = ("loaders", "lora", "nodes", "offload")
    pack.mkdir()
    shutil.copyfile(ROOT / "__init__.py", pack / "__init__.py")
    for folder in folders:
        shutil.copytree(ROOT / folder, pack / folder, ignore=shutil.ignore_patterns("__pycache__"))
    said = run_in_host(
        f"""
import asyncio
import comfy.cli_args
comfy.cli_args.args.cpu = True
import nodes
assert asyncio.run(nodes.load_custom_node({str(pack)!r}))
print("loader" if "SluiceDiffusionModelLoader" in nodes.NODE_CLASS_MAPPINGS else "none", nodes.EXTENSION_WEB_DIRS)
"""
    )
    assert said.splitlines()[-1] == "loader {}"
