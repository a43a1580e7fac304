"""What the live view makes of a report from a server with two GPUs, which the machine of this test need not have: VRAM
over the prompt and now, blocks of every state, a pass that waits for copies, weights used in place, LoRAs kept.

The report is that of a real server with a model that streams; what only a GPU brings is put into it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from host.test_web import FILE, OPEN, READ, SWAP
from pack.nodes.report.text import size
from pack.tools import demo, locales
from pack.tools.browser import Tab
from pack.tools.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

GB = 10**9
WORDS = locales.load(locales.SOURCE, locales.MAIN_FILE)[locales.OURS]
GPUS = [
    {"device": "cuda:0", "name": "Large", "allocated": 5 * GB, "reserved": 6 * GB, "free": 9 * GB, "total": 16 * GB},
    {"device": "cuda:1", "name": "Small", "allocated": None, "reserved": None, "free": 7 * GB, "total": 8 * GB},
]
BYTES = {"total": 10 * GB, "resident": 4 * GB, "streamed": 5 * GB, "on_disk": GB, "in_ram": 0, "ring": GB // 2}
STATES = ("resident", "streamed", "away", "unknown")
STEP = {"ms": 812.5, "compute_ms": 300.0, "copy_ms": 800.0, "gb_per_s": 6.154, "bound_by": "copy"}
LORAS = {"name": "loras", "bytes": GB // 2, "bound_bytes": GB, "entries": 2, "hits": 3, "misses": 1}


def with_gpus(said: dict[str, Any]) -> dict[str, Any]:
    (model,) = (model for model in said["models"] if model["name"] == FILE)
    model |= {"device": "cuda:0", "bytes": BYTES, "last_step": STEP, "misses": 2, "current_block": 1}
    model["unified_memory"] = {"mode": "auto", "bytes": 2 * GB, "reason": "GPU and CPU share their memory"}
    for block, state in zip(model["blocks"], STATES, strict=True):
        held = {"resident": GB, "unknown": None}.get(state, 0)
        block |= {"bytes": GB, "resident_bytes": held, "streamed_bytes": GB * (state == "streamed")}
    timeline = said["timeline"]
    for index, sample in enumerate(timeline["samples"]):
        row = dict(zip(timeline["columns"], sample, strict=True))
        row |= {"vram_used": 2 * GB + index, "vram_allocated": GB + index}
        sample[:] = [row[column] for column in timeline["columns"]]
    timeline["peak"] |= {"vram_used": 7 * GB, "vram_allocated": 5 * GB}
    return said | {"vram": GPUS, "caches": [LORAS, *said["caches"][1:]]}


@pytest.fixture(scope="module")
def tab(chromium: Browser, demo_server: Server) -> Iterator[Tab]:
    _, api = demo.prompt_for("red seven on white", FILE, 44)
    api["6"]["inputs"].update(steps=2)
    api["1"]["inputs"]["block_swap"] = ["20", 0]
    demo_server.queue({**api, "20": SWAP})
    said = with_gpus(demo_server.get("/sluice/report"))
    opened = Tab.open(chromium, demo_server)
    opened.page.route("**/sluice/report", lambda route: route.fulfill(body=json.dumps(said)))
    opened.page.locator(OPEN).click()
    opened.page.wait_for_selector(".sluice-live article")
    yield opened
    assert opened.own_errors() == []
    opened.close()


@pytest.fixture(scope="module")
def shown(tab: Tab) -> dict[str, Any]:
    return tab.page.evaluate(READ)


@pytest.fixture(scope="module")
def card(shown: dict[str, Any]) -> dict[str, Any]:
    (found,) = (card for card in shown["models"] if card["name"] == FILE)
    return found


def test_vram_over_the_prompt(tab: Tab, shown: dict[str, Any]) -> None:
    assert shown["peak"][WORDS["series_vram_used"]] == size(7 * GB)
    assert shown["peak"][WORDS["series_vram_allocated"]] == size(5 * GB)
    lines = tab.page.locator(".sl-chart polyline").evaluate_all("(all) => all.map((one) => one.getAttribute('class'))")
    assert sorted(line.split("sl-line-")[1] for line in lines) == [
        *("ram_anonymous", "ram_file", "vram_allocated", "vram_used"),
    ]


def test_memory_of_each_gpu(tab: Tab, shown: dict[str, Any]) -> None:
    assert shown["meters"][:2] == [
        ["cuda:0 Large", f"{size(9 * GB)} of {size(16 * GB)} free"],
        ["cuda:1 Small", f"{size(7 * GB)} of {size(8 * GB)} free"],
    ]
    first = tab.page.locator(".sl-meter").first.locator("dl > div:visible").all_inner_texts()
    parts = {"vram_allocated": 5 * GB, "vram_reserved": GB, "vram_others": GB}
    assert [row.split("\n") for row in first] == [[WORDS[word], size(nbytes)] for word, nbytes in parts.items()]


def test_bytes_and_blocks_of_every_state(tab: Tab, card: dict[str, Any]) -> None:
    assert card["total"] == WORDS["weights_total"].format(size=size(10 * GB))
    parts = {"place_gpu": "resident", "part_ring": "ring", "part_streamed": "streamed", "part_in_file": "on_disk"}
    assert card["parts"] == {WORDS[word]: size(BYTES[part]) for word, part in parts.items()}
    assert card["states"] == list(STATES)
    told = [WORDS[word] for word in ("place_gpu", "state_streamed", "part_in_file", "block_moved")]
    assert all(words in label for words, label in zip(told, card["blocks"], strict=True))
    current = tab.page.locator(".sl-block[data-current]")
    assert current.count() == 1 and WORDS["block_now"] in (current.get_attribute("aria-label") or "")
    fills = tab.page.locator(".sl-block").evaluate_all("(all) => all.map((one) => getComputedStyle(one).background)")
    assert len(set(fills[:4])) == 4, "two states look the same"


def test_copies_bind(card: dict[str, Any]) -> None:
    assert card["times"] == ["300.0 ms", WORDS["binds"].format(time="800.0 ms")]
    (told,) = (note for note in card["notes"] if note.startswith("Last pass"))
    assert told.startswith("Last pass 812.5 ms, 6.15 of ") and "2 waited for unforeseen copies" in told
    assert WORDS["copy_binds"] in card["notes"]
    assert WORDS["in_place"].format(size=size(2 * GB), reason="GPU and CPU share their memory") in card["notes"]


def test_a_cache_with_its_bound_and_hits(shown: dict[str, Any]) -> None:
    told = f"2 files, {size(GB // 2)} of {size(GB)}, 3 hits, 1 miss"
    assert shown["caches"][0].split("\n") == [WORDS["cache_loras"], told]
