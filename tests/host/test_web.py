"""The live view in a real browser on a real server: a workflow is dropped, queued and watched, and the panel says what
`GET /sluice/report` says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, Any

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
HOSTILE = f"<img src=x onerror=window.hacked=1> & 'quoted' {'and_long_' * 12}.gguf"
SWAP = {"class_type": "SluiceBlockSwapConfig", "inputs": {"vram_budget_gb": 0.01}}  # the demo's weights take 0.0113
OPEN = ".sluice-tab-button"
ORDER = ("diffusion_model", "text_encoder", "vae", "other")
READ = """() => {
    const text = (root, selector) => root.querySelector(selector)?.textContent ?? null;
    const parts = (root) => Object.fromEntries([...root.querySelectorAll("dl > div:not([hidden])")].map((row) =>
        [row.querySelector("dt").textContent, row.querySelector("dd").textContent]));
    const visible = (root, selector) => [...root.querySelectorAll(selector)].filter((one) => one.checkVisibility());
    const panel = document.querySelector(".sluice-live");
    return {
        stage: text(panel, ".sl-stage-now"),
        steps: text(panel, ".sl-steps"),
        peak: parts(panel.querySelector(".sl-legend").parentElement),
        stages: [...panel.querySelectorAll(".sl-stage title")].map((title) => title.textContent),
        models: [...panel.querySelectorAll("article")].map((card) => ({
            name: text(card, "h3"),
            total: text(card, ".sl-total"),
            parts: parts(card),
            notes: visible(card, ".sl-note, summary, .sl-step-total").map((note) => note.textContent),
            times: visible(card, ".sl-time-value").map((time) => time.textContent),
            blocks: visible(card, ".sl-block").map((block) => block.getAttribute("aria-label")),
            states: visible(card, ".sl-block").map((block) => block.dataset.state),
            loras: [...card.querySelectorAll(".sl-loras li")].map((row) => row.innerText),
        })),
        meters: [...panel.querySelectorAll(".sl-meter")].map((meter) => [text(meter, "h3"), text(meter, ".sl-free")]),
        caches: [...panel.querySelectorAll("[aria-label=Caches] li")].map((row) => row.innerText),
    };
}"""


@pytest.fixture(scope="module")
def tab(chromium: Browser, demo_server: Server) -> Iterator[Tab]:
    """The frontend in its dark theme, with the panel open."""
    opened = Tab.open(chromium, demo_server)
    opened.page.locator(OPEN).click()
    opened.page.wait_for_selector(".sluice-live h2")
    yield opened
    opened.close()


def report(server: Server) -> dict[str, Any]:
    return server.get("/sluice/report")


def prompt(model: str = FILE, seed: int = 5, **inputs: Any) -> dict[str, Any]:
    """The demo with these inputs of the loader, and a Block Swap Config as node 20."""
    _, api = demo.prompt_for("red seven on white", model, seed)
    api["6"]["inputs"]["steps"] = 4
    api["1"]["inputs"].update(inputs)
    return {**api, "20": SWAP}


def queue(server: Server, **inputs: Any) -> None:
    server.queue(prompt(**inputs))


def unload(server: Server) -> None:
    server.post("/free", {"unload_models": True, "free_memory": True})


def read(tab: Tab, server: Server) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the panel says after a refresh, and what the server says then, while nothing runs."""
    with tab.page.expect_response("**/sluice/report"):
        tab.page.get_by_role("button", name="Refresh").click()
    tab.page.wait_for_timeout(200)
    said = report(server)
    said["models"].sort(key=lambda model: ORDER.index(model["kind"]))
    return tab.page.evaluate(READ), said


def fixed(value: float, digits: int) -> str:
    """As JavaScript's `toFixed`, which rounds half up where Python rounds half to even."""
    return str(Decimal(value).quantize(Decimal(10) ** -digits, ROUND_HALF_UP))


def test_a_workflow_is_dropped_queued_and_watched(tab: Tab, demo_server: Server) -> None:
    unload(demo_server)
    demo_server.post("/history", {"clear": True})
    tab.drop(demo.WORKFLOW)
    tab.page.evaluate(
        """() => {
            window.seen = new Set();
            const progress = document.querySelector(".sl-progress");
            const note = () => window.seen.add(document.querySelector(".sl-stage-now").textContent + progress.value);
            const options = { attributes: true, childList: true, characterData: true, subtree: true };
            new MutationObserver(note).observe(document.querySelector(".sl-status"), options);
        }"""
    )
    tab.run()
    tab.page.wait_for_function("[...window.seen].some((told) => /^Sampling[1-9]/.test(told))", timeout=120_000)
    tab.page.wait_for_function("document.querySelector('.sl-stage-now').textContent === 'Idle'", timeout=120_000)
    (entry,) = demo_server.get("/history").values()
    assert entry["status"]["status_str"] == "success"
    shown, said = read(tab, demo_server)
    assert shown["stages"] == [mark["stage"] for mark in said["timeline"]["marks"] if mark["stage"]]
    assert {"encode", "sample", "decode"} <= set(shown["stages"])
    assert tab.own_errors() == []


def test_the_panel_says_what_the_route_says(tab: Tab, demo_server: Server) -> None:
    queue(demo_server)
    shown, said = read(tab, demo_server)
    assert shown["stage"] == "Idle" and len(shown["models"]) == len(said["models"]) == 3
    for card, model in zip(shown["models"], said["models"], strict=True):
        parts = model["bytes"]
        assert (card["name"], card["total"]) == (model["name"], f"{size(parts['total'])} of weights")
        expected = {"ready on the CPU": "resident", "in RAM": "in_ram", "in the file only": "on_disk"}
        assert card["parts"] == {label: size(parts[part]) for label, part in expected.items() if parts[part]}
        assert len(card["blocks"]) == len(model["blocks"]) and set(card["states"]) <= {"resident"}
        for text, block in zip(card["blocks"], model["blocks"], strict=True):
            assert text == f"{block['name']}, {size(block['bytes'])}; 100 % ready on the CPU"
        assert card["times"] == []  # nothing streams
    peak = said["timeline"]["peak"]
    assert shown["peak"] == {"RAM": size(peak["ram_anonymous"]), "RAM of files": size(peak["ram_file"])}
    assert shown["meters"][0][0] == "RAM" and f"of {size(said['host_ram']['total'])} free" in shown["meters"][0][1]
    assert shown["caches"][1].split() == ["kernels", str(said["caches"][1]["entries"]), "kept"]
    assert f"{fixed(said['prompt']['step_ms'], 1)} ms a step" == shown["steps"]


def test_a_streamed_model_shows_what_a_step_waits_for(tab: Tab, demo_server: Server) -> None:
    queue(demo_server, seed=6, block_swap=["20", 0])
    shown, said = read(tab, demo_server)
    (model,) = [model for model in said["models"] if model["name"] == FILE]
    (card,) = [card for card in shown["models"] if card["name"] == FILE]
    parts = model["bytes"]
    assert card["parts"]["streamed each pass"] == size(parts["streamed"]) and parts["streamed"] > 0
    assert card["parts"]["ring, on top"] == size(parts["ring"])
    step = model["last_step"]
    times = {"compute": step["compute_ms"], "copy": step["copy_ms"]}
    assert card["times"] == [
        f"{fixed(milliseconds, 1)} ms" + ", binds" * (step["bound_by"] == name) for name, milliseconds in times.items()
    ]
    speed, link = fixed(step["gb_per_s"], 2), fixed(model["plan"]["link_gb_per_s"], 2)
    assert f"Last pass {fixed(step['ms'], 1)} ms, {speed} of {link} GB/s" in card["notes"]
    assert any(note.startswith("Streams from") for note in card["notes"])
    tab.page.get_by_text("Streams from").click()
    shown, said = read(tab, demo_server)
    (card,) = [card for card in shown["models"] if card["name"] == FILE]
    assert {model["source"]["reason"], model["plan"]["text"]} <= set(card["notes"])
    streamed = sum("streamed" in text for text in card["blocks"])
    assert streamed == sum(block["streamed_bytes"] > 0 for block in model["blocks"]) > 0


def test_the_block_that_computes_is_marked(tab: Tab, demo_server: Server) -> None:
    api = prompt(seed=8, block_swap=["20", 0])
    api["6"]["inputs"]["steps"] = 400
    demo_server.post("/prompt", {"prompt": api})
    try:
        tab.page.wait_for_selector(".sl-block[data-current]", timeout=120_000)
        assert tab.page.locator(".sl-stage-now").inner_text() == "Sampling"
    finally:
        demo_server.post("/interrupt", {})
        tab.page.wait_for_function("document.querySelector('.sl-stage-now').textContent === 'Idle'", timeout=60_000)


def test_loras_are_listed(tab: Tab, demo_server: Server) -> None:
    _, api = demo.prompt_for("red seven on white", FILE, 7)
    lora = {"lora_name": "demo_lora.safetensors", "strength_model": 0.75, "strength_clip": 1.0, "model": ["1", 0]}
    api["30"] = {"class_type": "SluiceLoraLoader", "inputs": lora}
    api["6"]["inputs"].update(model=["30", 0], steps=2)
    demo_server.queue(api)
    shown, said = read(tab, demo_server)
    (model,) = [model for model in said["models"] if model["name"] == FILE]
    (row,) = next(card["loras"] for card in shown["models"] if card["name"] == FILE)
    weights, nbytes = model["loras"][0]["weights"], size(model["loras"][0]["bytes"])
    assert row.split("\n") == ["demo_lora.safetensors", f"LoRA at 0.75 · {weights} weights · {nbytes} · auto"]


def test_nothing_is_loaded(tab: Tab, demo_server: Server) -> None:
    unload(demo_server)
    tab.page.wait_for_function("!document.querySelector('.sluice-live article')", timeout=30_000)
    assert tab.page.get_by_text("No model is loaded").is_visible()


def test_a_report_that_cannot_be_had_is_told(tab: Tab) -> None:
    tab.page.route("**/sluice/report", lambda route: route.abort())
    tab.page.get_by_role("button", name="Refresh").click()
    alert = tab.page.locator(".sluice-live [role=alert]")
    alert.wait_for()
    assert "could not be read" in alert.inner_text()
    tab.page.unroute("**/sluice/report")
    tab.page.get_by_role("button", name="Refresh").click()
    alert.wait_for(state="hidden")


def test_the_panel_comes_and_goes(tab: Tab) -> None:
    for _ in range(3):
        tab.page.locator(OPEN).click()
        tab.page.wait_for_selector(".sluice-live", state="detached")
        tab.page.locator(OPEN).click()
        tab.page.wait_for_selector(".sluice-live h2")
    assert tab.page.locator(".sluice-live").count() == 1
    assert tab.own_errors() == []


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_text_is_readable_in_both_themes(chromium: Browser, demo_server: Server, theme: Any) -> None:
    """By the contrast that WCAG 2 asks of text, 4.5 to 1, on what really lies behind it."""
    queue(demo_server, seed=6, block_swap=["20", 0])
    opened = Tab.open(chromium, demo_server, theme=theme)
    opened.page.locator(OPEN).click()
    opened.page.wait_for_selector(".sluice-live article")
    found = opened.page.evaluate(
        """() => {
            const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
            const blend = (colours) => {
                context.clearRect(0, 0, 1, 1);
                for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
                return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
            };
            const behind = (element) => {
                const layers = [];
                for (let at = element; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
                return layers;
            };
            const light = (rgb) => rgb.map((value) => value / 255)
                .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
                .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
            const panel = document.querySelector(".sluice-live");
            const elements = [...panel.querySelectorAll("*")].filter((one) => one.checkVisibility() &&
                [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()));
            return elements.map((element) => {
                const style = getComputedStyle(element);
                const own = element instanceof SVGElement ? style.fill : style.color;
                const band = element.matches(".sl-stage-name") ? [getComputedStyle(
                    element.parentElement.querySelector(".sl-stage-sample")).fill] : [];
                const back = [...behind(element), ...band];
                const [a, b] = [light(blend([...back, own])), light(blend(back))];
                const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
                return [element.getAttribute("class") ?? element.tagName, contrast, b];
            });
        }"""
    )
    opened.close()
    assert len(found) > 20
    assert [(what, round(contrast, 2)) for what, contrast, _ in found if contrast < 4.5] == []
    assert all((behind > 0.5) == (theme == "light") for what, _, behind in found if what == "H2")


def test_everything_is_reached_by_keyboard(tab: Tab, demo_server: Server) -> None:
    page = tab.page
    queue(demo_server, seed=16, block_swap=["20", 0])
    page.wait_for_selector(".sluice-live article")
    page.locator(OPEN).click()
    page.locator(OPEN).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".sluice-live .sl-block")
    reached = []
    page.locator(".sluice-live button").focus()
    for _ in range(12):
        focused = "[document.activeElement.getAttribute('role'), document.activeElement.tagName]"
        role, name = page.evaluate(f"document.activeElement.closest('.sluice-live') ? {focused} : [null, null]")
        reached.append(role or name)
        page.keyboard.press("Tab")
    assert {"BUTTON", "slider", "listbox", "SUMMARY"} <= set(reached)

    blocks = page.get_by_role("listbox").first
    blocks.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    chosen = page.get_by_role("option", selected=True)
    assert chosen.get_attribute("id") == blocks.get_attribute("aria-activedescendant")
    name = chosen.get_attribute("aria-label")
    assert name and name.startswith("joint_blocks.1, ")
    assert blocks.locator("xpath=..").locator(".sl-detail").inner_text() == name
    page.keyboard.press("End")
    assert (chosen.get_attribute("aria-label") or "").startswith("joint_blocks.3, ")
    page.keyboard.press("Escape")
    assert chosen.count() == 0

    slider = page.get_by_role("slider", name="Time in the prompt")
    slider.focus()
    page.keyboard.press("Home")
    assert (slider.get_attribute("aria-valuetext") or "").startswith("At 0.0 s")
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuenow") == "1"
    assert page.locator(".sl-cursor").count() == 1


def test_a_hostile_name_stays_text(tab: Tab, demo_server: Server) -> None:
    folder = demo_server.models_dir / "diffusion_models"
    try:
        shutil.copyfile(folder / FILE, folder / HOSTILE)
    except OSError as error:
        pytest.skip(f"this system has no such file names: {error}")
    try:
        queue(demo_server, model=HOSTILE)
        shown, _ = read(tab, demo_server)
        assert HOSTILE in [card["name"] for card in shown["models"]]
        assert tab.page.evaluate("window.hacked") is None
        assert tab.page.locator(".sluice-live img").count() == 0
        sticks_out = "(all) => all.filter((one) => one.scrollWidth > one.clientWidth).length"
        assert tab.page.locator(".sluice-live, .sl-card").evaluate_all(sticks_out) == 0
    finally:
        unload(demo_server)
        (folder / HOSTILE).unlink()


def test_the_settings_are_in_the_dialog_and_count(tab: Tab, demo_server: Server) -> None:
    names = [line.split('"')[1] for line in (ROOT / "web/js/settings.js").read_text().splitlines() if " id: " in line]
    values = tab.page.evaluate("(ids) => ids.map((id) => app.extensionManager.setting.get(id))", names)
    assert dict(zip(names, values, strict=True)) == {
        "sluice.weight_source": "auto",
        "sluice.reserve_gb": 0.5,
        "sluice.unified_memory": "off",
        "sluice.log_level": "info",
    }
    tab.page.evaluate("app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    tab.page.get_by_placeholder(re.compile("Search Settings", re.IGNORECASE)).first.fill("sluice")
    tab.page.get_by_text("VRAM to leave free (GB)").first.wait_for()
    try:
        for level, told in (("warning", False), ("info", True)):
            tab.page.evaluate("(level) => app.extensionManager.setting.set('sluice.log_level', level)", level)
            unload(demo_server)
            before = len(demo_server.log_path.read_text(errors="replace"))
            queue(demo_server, seed=90 + told, compute_dtype="float32")
            log = demo_server.log_path.read_text(errors="replace")[before:]
            assert ("loaded demo_mmdit" in log) == told
    finally:
        demo_server.post("/settings", dict(zip(names, values, strict=True)))
