"""Each file in example_workflows/ is what the frontend of a running server expects to open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pack.tools import workflow
from pack.tools.host import ROOT
from pack.tools.server import Server

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
NUMBERS: dict[str, tuple[type, ...]] = {"INT": (int,), "FLOAT": (int, float)}
WIDGETS = {"COMBO", "STRING", "BOOLEAN", *NUMBERS}


@pytest.fixture(scope="module")
def known_nodes(demo_server: Server) -> dict[str, Any]:
    return demo_server.object_info()


def inputs_of(definition: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """A node type's inputs in the frontend's order: name -> (type, options).  A list for a type is a combo."""
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in definition["input"].get(group, {}).items():
            described = dict(options[0]) if options else {}
            if isinstance(kind, list):
                kind, described["options"] = "COMBO", kind
            found[name] = (kind, described)
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_and_widgets_match_the_server(path: Path, known_nodes: dict[str, Any]) -> None:
    for node in workflow.load(path)["nodes"]:
        assert node["type"] in known_nodes
        definition = known_nodes[node["type"]]
        inputs = inputs_of(definition)
        widgets = [
            name for name, (kind, options) in inputs.items() if kind in WIDGETS and not options.get("forceInput")
        ]
        values = workflow.widget_values(node)
        assert list(values) == widgets, node["type"]
        for name, value in values.items():
            check_value(value, *inputs[name])
        sockets = {slot["name"]: slot["type"] for slot in node["inputs"] if "widget" not in slot}
        assert sockets == {name: kind for name, (kind, _) in inputs.items() if name not in widgets}
        assert [slot["type"] for slot in node["outputs"]] == definition["output"]
        linked = {slot["name"] for slot in node["inputs"] if slot["link"] is not None}
        required = set(definition["input"].get("required", {}))
        assert required <= linked | set(widgets), f"{node['type']}: a required input is neither linked nor a widget"


def check_value(value: Any, kind: str, options: dict[str, Any]) -> None:
    if kind == "COMBO":
        assert value in options["options"]
    elif kind in NUMBERS:
        assert isinstance(value, NUMBERS[kind])
        assert options["min"] <= value <= options["max"]
    else:
        assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_links_join_what_they_say(path: Path) -> None:
    saved = workflow.load(path)
    nodes = {node["id"]: node for node in saved["nodes"]}
    assert saved["last_node_id"] == max(nodes)
    assert saved["last_link_id"] == max(link[0] for link in saved["links"])
    for number, source, source_slot, target, target_slot, kind in saved["links"]:
        output = nodes[source]["outputs"][source_slot]
        socket = nodes[target]["inputs"][target_slot]
        assert output["type"] == socket["type"] == kind
        assert number in output["links"]
        assert socket["link"] == number
    ends = [slot["link"] for node in saved["nodes"] for slot in node["inputs"] if slot["link"] is not None]
    starts = [link for node in saved["nodes"] for slot in node["outputs"] for link in slot["links"] or []]
    assert sorted(ends) == sorted(starts) == sorted(link[0] for link in saved["links"])
