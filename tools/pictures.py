"""The pictures of the help pages and of the example workflows: `.venv/bin/python tools/pictures.py [NAME ...]`.

ComfyUI's own frontend draws them, in a browser on a real server: each node as web/docs/ID.png, each workflow as
example_workflows/NAME.jpg, which ComfyUI shows beside it under Templates. Without names, all are made anew. A picture
carries a stamp of what it shows, and a test fails when that has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if "pack" not in sys.modules:  # run as a script
    sys.modules["pack"] = types.ModuleType("pack")
    sys.modules["pack"].__path__ = [str(ROOT)]

from pack.tools import demo, example_workflows, host, locales  # noqa: E402
from pack.tools.browser import Tab, browser  # noqa: E402
from pack.tools.server import Server  # noqa: E402
from PIL import Image  # noqa: E402
from PIL.PngImagePlugin import PngInfo  # noqa: E402

HELP = ROOT / "web" / "docs"
WORKFLOWS = ROOT / "example_workflows"
AT_MOST = 40_000  # bytes of a picture
SIZE = (1920, 1200)
THUMBNAIL_WIDTH = 800
RATIOS = (1.4, 2.0)  # width to height of a thumbnail, which is shown cut to about that
MARGIN = 10
STAMP = "shows"  # the PNGs' field; in the JPEGs it is the comment
COLOURS = 256  # of a node's picture

# Nothing of what the frontend lays over the graph.
ONLY_THE_GRAPH = """
    body * { visibility: hidden !important; }
    #graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important; }
"""
# The frontend keeps widgets' values by the node's number and the widget's name, also of nodes that are gone.
ONE_NODE = """async ([id, number]) => {
    const { app, LiteGraph } = window;
    app.graph.clear();
    app.graph.last_node_id = number;
    const node = LiteGraph.createNode(id);
    app.graph.add(node);
    node.showAdvanced = true;
    node.pos = [0, 0];
    node.setSize(node.computeSize());
    node.size[0] = Math.max(node.size[0], 380);
    app.canvas.show_info = false;
    return [...node.size];
}"""
# A badge tells of a file, and the workflows' files are empty here.
LOOK_AT = """async ([x, y, width, height, margin]) => {
    const { canvas, graph } = window.app;
    canvas.show_info = false;
    canvas.min_font_size_for_lod = 0;  // text, however small
    for (const node of graph._nodes) node.badges = [];
    const scale = Math.min(1, (innerWidth - 2 * margin) / width, (innerHeight - 2 * margin) / height);
    canvas.ds.scale = scale;
    canvas.ds.offset = [(innerWidth / scale - width) / 2 - x, (innerHeight / scale - height) / 2 - y];
    canvas.deselectAll?.();
    canvas.setDirty(true, true);
    for (let frame = 0; frame < 4; frame++) await new Promise(requestAnimationFrame);
    return scale;
}"""
BOUNDS = """() => {
    const boxes = [...app.graph._nodes, ...app.graph._groups].map((item) => item.boundingRect ?? item._bounding);
    const left = Math.min(...boxes.map((box) => box[0])), top = Math.min(...boxes.map((box) => box[1]));
    const right = Math.max(...boxes.map((box) => box[0] + box[2]));
    const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
    return [left, top, right - left, bottom - top];
}"""
TITLE = 30  # pixels above a node's position


def stamp_of_node(definition: Mapping[str, Any]) -> str:
    """What the picture of a node shows, in short; files that a server happens to have are left out."""
    slots = [
        (name, kind if isinstance(kind, str) else "COMBO", options[0].get("default") if options else None)
        for group in locales.SLOTS
        for name, (kind, *options) in definition["input"].get(group, {}).items()
    ]
    return _digest(json.dumps([definition["display_name"], slots, definition["output_name"]]).encode())


def stamp_of_workflow(path: Path) -> str:
    return _digest(path.read_bytes())


def stamp_in(path: Path) -> str:
    """The stamp that a picture was made with."""
    with Image.open(path) as picture:
        stamp = picture.info.get(STAMP) or picture.info.get("comment", b"").decode()
    return stamp


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def node_picture(tab: Tab, key: str, number: int, stamp: str) -> bytes:
    """A node as it is when it is added, its advanced inputs shown: PNG."""
    width, height = tab.page.evaluate(ONE_NODE, [key, number])
    tab.page.evaluate(LOOK_AT, [0, -TITLE, width, height + TITLE, MARGIN])
    tab.page.wait_for_timeout(300)
    x, y = (SIZE[0] - width) / 2 - MARGIN, (SIZE[1] - height - TITLE) / 2 - MARGIN
    clip = {"x": x, "y": y, "width": width + 2 * MARGIN, "height": height + TITLE + 2 * MARGIN}
    shot = Image.open(io.BytesIO(tab.page.screenshot(clip=clip)))  # type: ignore[arg-type]
    written, said = io.BytesIO(), PngInfo()
    said.add_text(STAMP, stamp)
    shot.convert("RGB").quantize(COLOURS).save(written, "PNG", optimize=True, pnginfo=said)
    return written.getvalue()


def workflow_picture(tab: Tab, path: Path) -> bytes:
    """A whole graph, small: JPEG."""
    graph: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    tab.page.evaluate("async (graph) => { await window.app.loadGraphData(graph); }", graph)
    tab.page.wait_for_timeout(500)
    bounds = tab.page.evaluate(BOUNDS)
    tab.page.evaluate(LOOK_AT, [*bounds, MARGIN])
    tab.page.wait_for_timeout(300)
    shot = Image.open(io.BytesIO(tab.page.screenshot())).convert("RGB")
    ratio = min(max(bounds[2] / bounds[3], RATIOS[0]), RATIOS[1])
    width, height = min(SIZE[0], round(SIZE[1] * ratio)), min(SIZE[1], round(SIZE[0] / ratio))
    left, top = (SIZE[0] - width) // 2, (SIZE[1] - height) // 2
    small = (THUMBNAIL_WIDTH, round(THUMBNAIL_WIDTH * height / width))
    shot = shot.crop((left, top, left + width, top + height)).resize(small, Image.Resampling.LANCZOS)
    for quality in range(85, 30, -5):
        written = io.BytesIO()
        shot.save(written, "JPEG", quality=quality, optimize=True, progressive=True, comment=stamp_of_workflow(path))
        if written.tell() <= AT_MOST:
            return written.getvalue()
    raise ValueError(f"{path.name} makes no picture of {AT_MOST} bytes at most; make THUMBNAIL_WIDTH smaller")


def main(names: list[str]) -> None:
    found = host.find()
    with tempfile.TemporaryDirectory() as base:
        example_workflows.place_files(Path(base) / "models")
        demo.prepare_models(found)
        demo.copy_models(Path(base) / "models")
        with Server(found, Path(base), "--cpu") as server, browser() as running:
            tab = Tab.open(running, server, width=SIZE[0], height=SIZE[1])
            tab.page.add_style_tag(content=ONLY_THE_GRAPH)
            nodes = locales.ours(server.object_info())
            for number, key in enumerate(sorted(nodes), 1000):
                if not names or key in names:
                    (HELP / f"{key}.png").write_bytes(node_picture(tab, key, number, stamp_of_node(nodes[key])))
            for path in sorted(WORKFLOWS.glob("*.json")):
                if not names or path.stem in names:
                    path.with_suffix(".jpg").write_bytes(workflow_picture(tab, path))


if __name__ == "__main__":
    main(sys.argv[1:])
