"""Each node has a picture in its help, each workflow one beside it, README some of the demo and the live view: small,
of what is there now, and served."""

from __future__ import annotations

import io
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from pack.tools import locales, pictures, screenshots
from pack.tools.browser import browser
from pack.tools.server import PACK_NAME, Server
from PIL import Image, ImageChops, ImageStat

WORKFLOWS = sorted(pictures.WORKFLOWS.glob("*.json"))
HOW = "run tools/pictures.py with the Python of .venv"


@pytest.fixture(scope="module")
def nodes(server: Server) -> dict[str, Any]:
    return locales.ours(server.object_info())


def fetch(server: Server, path: str) -> bytes:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{server.url}/{path}", timeout=30) as answer:
        return answer.read()


def check(content: bytes, kind: str) -> None:
    """A picture of this kind that is small and not empty."""
    assert len(content) <= pictures.AT_MOST
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == kind
        assert picture.width >= 300
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_help_shows_each_node_as_it_is_now(nodes: dict[str, Any], server: Server) -> None:
    assert {path.stem for path in pictures.HELP.glob("*.png")} == set(nodes)
    for key, definition in nodes.items():
        page = (pictures.HELP / f"{key}.md").read_text(encoding="utf-8")
        assert f"]({key}.png)" in page
        check(fetch(server, f"extensions/{PACK_NAME}/docs/{key}.png"), "PNG")
        assert pictures.stamp_in(pictures.HELP / f"{key}.png") == pictures.stamp_of_node(definition), f"{key}: {HOW}"


def test_there_is_no_thumbnail_without_a_workflow() -> None:
    assert {path.stem for path in pictures.WORKFLOWS.glob("*.jpg")} == {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_templates_show_each_workflow_as_it_is_now(path: Path, server: Server) -> None:
    assert path.stem in server.get("/workflow_templates")[PACK_NAME]
    check(fetch(server, f"api/workflow_templates/{PACK_NAME}/{path.stem}.jpg"), "JPEG")
    assert pictures.stamp_in(path.with_suffix(".jpg")) == pictures.stamp_of_workflow(path), HOW


def test_readme_shows_the_demo_and_the_live_view_as_they_are_now(server: Server) -> None:
    stamps = screenshots.stamps_of(server.object_info())
    assert {path.name for path in screenshots.DOCS.glob("*.png")} == set(stamps)
    found = {name: pictures.stamp_in(screenshots.DOCS / name) for name in stamps}
    assert found == stamps, "run python dev.py screenshots, while the machine does nothing else"


@pytest.mark.browser
def test_the_demo_still_looks_as_in_the_readme(demo_server: Server) -> None:
    """Taken anew, and compared with the kept one: a few shades of antialiased text may differ."""
    with browser() as running:
        taken = Image.open(io.BytesIO(screenshots.demo_in_the_window(running, demo_server))).convert("RGB")
    kept = Image.open(screenshots.DOCS / "demo_workflow.png").convert("RGB")
    assert taken.size == kept.size
    assert difference(taken, kept) < 3
    assert difference(ImageChops.offset(taken, 25), kept) > 3  # the measure sees what is elsewhere


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean over all pixels, of 255."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


def test_a_stamp_follows_what_is_shown_and_not_which_files_there_are() -> None:
    node: dict[str, Any] = {
        "display_name": "A",
        "output_name": ["MODEL"],
        "input": {"required": {"file": ("COMBO", {"options": ["a"]}), "size": ("INT", {"default": 1})}},
    }
    stamp = pictures.stamp_of_node(node)
    node["input"]["required"]["file"][1]["options"].append("b")
    assert pictures.stamp_of_node(node) == stamp
    node["input"]["required"]["size"][1]["default"] = 2
    assert pictures.stamp_of_node(node) != stamp
