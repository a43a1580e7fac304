"""The frontend shows the texts of the user's language: on a node, and in the settings dialog."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pack.tools import locales, pictures
from pack.tools.browser import Tab, browser
from pack.tools.server import Server

pytestmark = pytest.mark.browser

LANGUAGE = "fr"
NODE = "SluiceOffloadMode"
SHOWN = """() => {
    const [node] = window.app.graph._nodes;
    const slots = [...node.inputs, ...node.widgets].map((slot) => [slot.name, slot.localized_name ?? slot.label]);
    return { title: node.title, inputs: Object.fromEntries(slots) };
}"""


@pytest.fixture(scope="module")
def tab(server: Server) -> Iterator[Tab]:
    with browser() as running:
        tab = Tab.open(running, server, settings={"Comfy.Locale": LANGUAGE})
        tab.page.evaluate(pictures.ONE_NODE, [NODE, 1])
        yield tab
        server.post("/settings", {"Comfy.Locale": "en"})


def test_a_node_is_labelled(tab: Tab) -> None:
    texts = locales.load(LANGUAGE)[NODE]
    shown = tab.page.evaluate(SHOWN)
    assert shown["title"] == texts["display_name"]
    assert {name: shown["inputs"].get(name) for name in texts["inputs"]} == {
        name: slot["name"] for name, slot in texts["inputs"].items()
    }


def test_settings_and_their_options_are_labelled(tab: Tab) -> None:
    texts = locales.load(LANGUAGE, locales.SETTINGS_FILE)
    tab.page.keyboard.press("Control+,")
    tab.page.get_by_text("Sluice", exact=True).first.click()
    for setting in texts.values():
        label = tab.page.get_by_text(setting["name"], exact=True)
        label.first.wait_for(timeout=10_000)
    for heading in locales.load(LANGUAGE, locales.MAIN_FILE)[locales.HEADINGS].values():
        tab.page.locator("h3").get_by_text(heading, exact=True).wait_for(timeout=10_000)
    chosen = texts["sluice_weight_source"]["options"]
    tab.page.get_by_text(chosen["Automatic"], exact=True).first.click()
    for text in chosen.values():
        tab.page.get_by_role("option", name=text, exact=True).wait_for(timeout=10_000)
