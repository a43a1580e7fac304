"""The example workflows in the frontend of a real browser: no node hides another, and in a subgraph the pack's nodes
make the prompt that they made before, run, and show what they show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from host.test_example_workflows import WORKFLOWS, stocked_server  # noqa: F401  (a fixture)
from pack.tools import demo
from pack.tools.browser import OURS, Tab
from pack.tools.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

PROMPT = "async () => (await app.graphToPrompt()).output"
INTO_A_SUBGRAPH = """(types) => {
    const nodes = app.graph._nodes.filter((node) => types.some((type) => node.type.startsWith(type)));
    app.graph.convertToSubgraph(new Set(nodes));
    return nodes.length;
}"""
SAVE_AND_OPEN = "async () => app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())))"
INNER_BADGES = """() => app.graph._nodes.flatMap((node) => node.subgraph?._nodes ?? [])
    .flatMap((node) => node.badges.map((badge) => badge.text)).filter(Boolean)"""
# Those that lie over another, title included.
OVERLAPPING = """() => {
    const boxes = app.graph._nodes.map((node) => {
        const [width, height] = node.computeSize().map((least, i) => Math.max(least, node.size[i]));
        return [node.title, node.pos[0], node.pos[1] - 30, width, height + 30];
    });
    return boxes.flatMap(([one, x, y, width, height], index) => boxes.slice(index + 1)
        .filter(([, x2, y2, wide, high]) => x < x2 + wide && x2 < x + width && y < y2 + high && y2 < y + height)
        .map(([other]) => `${one} and ${other}`));
}"""
# Two nodes that pass through whatever comes, between the sampler and the decoder.
PASSING_THROUGH = """() => {
    const byTitle = (title) => app.graph._nodes.find((node) => node.title === title);
    const [report, release] = ["SluiceMemoryReport", "SluiceReleaseMemory"].map((type) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        return node;
    });
    byTitle("Sampler").connect(0, report, 0);
    report.connect(0, release, 0);
    release.connect(0, byTitle("Decode"), 0);
}"""


@pytest.fixture(scope="module")
def stocked_tab(chromium: Browser, stocked_server: Server) -> Iterator[Tab]:  # noqa: F811
    opened = Tab.open(chromium, stocked_server)
    yield opened
    opened.close()


def flat(prompt: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """With nodes' numbers in the order in which a prompt names them, but without those of the subgraphs around them."""

    def own(number: str) -> str:
        return number.rpartition(":")[2]

    def renamed(value: Any) -> Any:
        return [own(value[0]), value[1]] if isinstance(value, list) else value

    return {
        own(number): {
            "class_type": node["class_type"],
            "inputs": {name: renamed(value) for name, value in node["inputs"].items()},
        }
        for number, node in prompt.items()
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_node_hides_another_and_a_subgraph_changes_nothing(stocked_tab: Tab, path: Path) -> None:
    """Loaders, LoRAs and stages in one subgraph, which is saved and opened again, make the same prompt."""
    page = stocked_tab.page
    stocked_tab.drop(path)
    assert page.evaluate(OVERLAPPING) == []
    before = page.evaluate(PROMPT)
    assert page.evaluate(INTO_A_SUBGRAPH, ["Sluice", "VAELoader"]) >= 2
    page.evaluate(SAVE_AND_OPEN)
    after = page.evaluate(PROMPT)
    assert sum(":" in number for number in after) >= 2
    assert flat(after) == flat(before)
    assert not [said for said in stocked_tab.errors if OURS in said]  # the frontend has some, opening so many at once


def test_hidden_nodes_are_found(stocked_tab: Tab) -> None:
    stocked_tab.drop(demo.WORKFLOW)
    stocked_tab.page.evaluate("app.graph._nodes[1].pos = [...app.graph._nodes[0].pos]")
    assert len(stocked_tab.page.evaluate(OVERLAPPING)) > 0


def test_it_runs_and_wears_badges(chromium: Browser, demo_server: Server) -> None:
    tab = Tab.open(chromium, demo_server)
    tab.drop(demo.WORKFLOW)
    tab.page.evaluate(PASSING_THROUGH)
    assert tab.page.evaluate(INTO_A_SUBGRAPH, ["SluiceDiffusionModelLoader", "CLIPLoader"]) == 2
    assert tab.page.evaluate(INTO_A_SUBGRAPH, ["SluiceMemoryReport", "SluiceReleaseMemory"]) == 2
    tab.page.evaluate(SAVE_AND_OPEN)
    tab.page.wait_for_function(f"(({INNER_BADGES})()).some((text) => text.includes('Q8_0'))")
    demo_server.post("/free", {"unload_models": True, "free_memory": True})  # or the text is encoded already
    entry = tab.run_to_the_end(demo_server)
    assert entry["status"]["status_str"] == "success"
    stages = {mark["stage"] for mark in demo_server.get("/sluice/report")["timeline"]["marks"]}
    assert {"encode", "sample", "decode"} <= stages
    assert tab.own_errors() == []
    tab.close()
