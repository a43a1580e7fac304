"""The live view in other languages than English, in a real browser on a real server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pack.tools import demo, locales
from pack.tools.browser import OURS, Tab
from pack.tools.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

FILE = demo.GGUF_FILES["Q8_0"]
OPEN = ".sluice-tab-button"
TRANSLATIONS = [language for language in locales.LANGUAGES if language != locales.SOURCE]
ENGLISH = locales.load(locales.SOURCE, locales.MAIN_FILE)[locales.OURS]
# The frontend offers a part of the languages only, and says all the others in English. What it was not set to is said
# by the module that the panel says its words with.
SPEAK = f"async (language) => (await import('/extensions/{OURS}/js/live/words.js')).speak(language)"
# All that is seen or read out; not what the server says in sentences of its own.
TEXTS = """() => {
    const panel = document.querySelector(".sluice-live");
    const walker = document.createTreeWalker(panel, NodeFilter.SHOW_TEXT);
    const found = [];
    while (walker.nextNode()) {
        const node = walker.currentNode;
        if (!node.parentElement.closest(".sluice-live [lang=en]")) found.push(node.data.trim());
    }
    for (const element of panel.querySelectorAll("[aria-label]")) found.push(element.getAttribute("aria-label"));
    return [found.filter((text) => text), panel.lang];
}"""


@pytest.fixture(scope="module")
def busy_server(demo_server: Server) -> Server:
    """With a model that streams, a LoRA on it, and something that was moved."""
    _, api = demo.prompt_for("red seven on white", FILE, 70)
    lora = {"lora_name": "demo_lora.safetensors", "strength_model": 0.75, "strength_clip": 1.0, "model": ["1", 0]}
    api["20"] = {"class_type": "SluiceBlockSwapConfig", "inputs": {"vram_budget_gb": 0.01}}
    api["1"]["inputs"]["block_swap"] = ["20", 0]
    api["30"] = {"class_type": "SluiceLoraLoader", "inputs": lora}
    api["6"]["inputs"].update(model=["30", 0], steps=3)
    demo_server.queue(api)
    return demo_server


def opened(chromium: Browser, server: Server, **settings: str) -> Tab:
    tab = Tab.open(chromium, server, settings=settings)
    tab.page.locator(OPEN).click()
    tab.page.wait_for_selector(".sluice-live .sl-loras li")
    return tab


@pytest.fixture(scope="module")
def tab(chromium: Browser, busy_server: Server) -> Iterator[Tab]:
    tab = opened(chromium, busy_server)
    yield tab
    tab.close()


def english_left(texts: list[str], words: dict[str, str]) -> list[str]:
    """What is an English word of the panel's, and not that of the language."""
    patterns = {
        word: re.sub(r"\\\{\w+\\\}", ".+", re.escape(text))
        for word, text in ENGLISH.items()
        if words[word] != text and re.search(r"[a-z]{3}", re.sub(r"\{\w+\}", "", text))
    }
    return [text for text in texts for pattern in patterns.values() if re.fullmatch(pattern, text)]


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_the_panel_speaks(tab: Tab, language: str) -> None:
    words = locales.load(language, locales.MAIN_FILE)[locales.OURS]
    tab.page.evaluate(SPEAK, language)
    tab.page.wait_for_selector(f".sluice-live[lang={language}] .sl-loras li")
    tab.page.locator(".sl-stage-now").get_by_text(words["status_idle"], exact=True).wait_for(timeout=10_000)
    texts, said = tab.page.evaluate(TEXTS)
    assert said == language
    headings = tab.page.locator(".sluice-live h2").all_inner_texts()
    wanted = [words[f"section_{section}"] for section in ("timeline", "models", "machine", "caches")]
    assert [heading.casefold() for heading in headings] == [heading.casefold() for heading in wanted]
    assert words["compute"] in texts
    strength = "0,75" if language in ("de", "fr", "es") else "0.75"
    assert words["lora_strength"].format(strength=strength) in " ".join(texts)
    assert english_left(texts, words) == []
    assert "{" not in "".join(texts) and "undefined" not in "".join(texts)
    assert tab.page.locator(".sluice-live").count() == 1
    sticks_out = "(all) => all.filter((one) => one.scrollWidth > one.clientWidth).length"
    assert tab.page.locator(".sluice-live, .sl-card").evaluate_all(sticks_out) == 0
    assert tab.own_errors() == []


def test_english_is_found_where_it_is_left(tab: Tab) -> None:
    tab.page.evaluate(SPEAK, locales.SOURCE)
    tab.page.wait_for_selector(".sluice-live[lang=en] .sl-loras li")
    texts, _ = tab.page.evaluate(TEXTS)
    assert len(english_left(texts, locales.load("de", locales.MAIN_FILE)[locales.OURS])) > 20


def test_a_language_of_a_country_is_that_language_and_an_unknown_one_english(tab: Tab) -> None:
    for wanted, said in (("zh-TW", "zh"), ("fr-CA", "fr"), ("tlh", "en")):
        tab.page.evaluate(SPEAK, wanted)
        tab.page.wait_for_selector(f".sluice-live[lang={said}] .sl-loras li")


@pytest.mark.parametrize(
    ("language", "said"),
    [
        ("en", ["1.00", "2.67", "0.75", "3", "1234.5 MB", "1 byte", "2 bytes", "<1 %"]),
        ("de", ["1,00", "2,67", "0,75", "3", "1234,5 MB", "1 Byte", "2 Byte", "<1 %"]),
        ("fr", ["1,00", "2,67", "0,75", "3", "1234,5 Mo", "1 octet", "2 octets", "<1 %"]),
        ("ja", ["1.00", "2.67", "0.75", "3", "1234.5 MB", "1バイト", "2バイト", "<1%"]),
    ],
)
def test_numbers(tab: Tab, language: str, said: list[str]) -> None:
    tab.page.evaluate(SPEAK, language)
    found = tab.page.evaluate(
        """async (live) => {
            const { number, exact, t } = await import(`${live}/words.js`);
            const { size, percent } = await import(`${live}/units.js`);
            const large = t("mb", { number: number(1234.5, 1) });
            const sizes = [large, size(1), size(2), percent(1, 1000)];
            return [number(1.005, 2), number(2.675, 2), exact(0.75), exact(3), ...sizes];
        }""",
        f"/extensions/{OURS}/js/live",
    )
    assert found == said


def test_it_follows_the_setting(chromium: Browser, busy_server: Server, tmp_path: Path) -> None:
    """When the page opens, and when another language is chosen: the panel, the tab's tooltip, the badges."""
    missing = tmp_path / "missing.json"
    missing.write_text(demo.WORKFLOW.read_text(encoding="utf-8").replace(FILE, "no such file.gguf"), encoding="utf-8")
    try:
        opened_tab = opened(chromium, busy_server, **{"Comfy.Locale": "fr"})
        page = opened_tab.page
        opened_tab.drop(missing)
        for language in ("fr", "ja"):
            words = locales.load(language, locales.MAIN_FILE)[locales.OURS]
            page.evaluate("(to) => app.extensionManager.setting.set('Comfy.Locale', to)", language)
            page.wait_for_selector(f".sluice-live[lang={language}] h2", timeout=60_000)
            page.wait_for_function(
                "(text) => document.querySelector('.sluice-tab-button').ariaLabel.startsWith(text)",
                arg=words["tab_tooltip"],
                timeout=60_000,
            )
            page.wait_for_function(
                "(text) => app.graph._nodes.some((node) => node.badges.some((badge) => badge.text === text))",
                arg=words["badge_missing"],
                timeout=60_000,
            )
        assert opened_tab.own_errors() == []
        opened_tab.close()
    finally:
        busy_server.post("/settings", {"Comfy.Locale": "en"})


def test_without_translations_it_is_english(chromium: Browser, busy_server: Server) -> None:
    page = chromium.new_page()
    page.route("**/i18n", lambda route: route.fulfill(status=404))
    page.goto(busy_server.url)
    page.wait_for_function("window.app?.vueAppReady", timeout=60_000)
    page.wait_for_selector(".p-blockui-mask-document", state="detached", timeout=60_000)
    page.locator(OPEN).click()
    page.wait_for_selector(".sluice-live[lang=en] h2")
    assert page.locator(".sluice-live h2").first.inner_text().casefold() == "memory over the prompt"
    page.close()
