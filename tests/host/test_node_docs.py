"""Every node that the server gets from the pack explains itself: description, tooltips, help page, README row."""

from __future__ import annotations

import re
import urllib.request
from typing import Any

import pytest
from pack.tools.host import ROOT
from pack.tools.server import PACK_NAME, Server

HELP = ROOT / "web" / "docs"


@pytest.fixture(scope="module")
def nodes(server: Server) -> dict[str, Any]:
    """Our nodes as the frontend gets them, by id."""
    found = server.object_info()
    return {key: node for key, node in found.items() if node["python_module"] == f"custom_nodes.{PACK_NAME}"}


def inputs(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of every input, hidden ones left out, by name."""
    groups = (node["input"].get(group, {}) for group in ("required", "optional"))
    return {name: dict(options[0]) if options else {} for group in groups for name, (_, *options) in group.items()}


def help_page(key: str) -> str:
    return (HELP / f"{key}.md").read_text(encoding="utf-8")


def test_ids_carry_the_packs_name(nodes: dict[str, Any]) -> None:
    assert nodes
    assert [key for key in nodes if not re.fullmatch(r"Sluice[A-Z]\w+", key)] == []
    assert {node["category"].split("/")[0] for node in nodes.values()} == {"Sluice"}


def test_each_node_and_input_is_described(nodes: dict[str, Any]) -> None:
    assert [key for key, node in nodes.items() if len(node["description"]) < 20] == []
    silent = [(key, name) for key, node in nodes.items() for name, o in inputs(node).items() if not o.get("tooltip")]
    assert silent == []


def test_each_node_has_a_help_page_and_each_page_a_node(nodes: dict[str, Any]) -> None:
    assert {page.stem for page in HELP.glob("*.md")} == set(nodes)


def test_help_pages_name_the_node_and_every_input_and_output(nodes: dict[str, Any]) -> None:
    missing = []
    for key, node in nodes.items():
        page = help_page(key)
        wanted = [f"# {node['display_name']}\n", *(f"- **{name}**" for name in [*inputs(node), *node["output_name"]])]
        missing += [(key, text) for text in wanted if text not in page]
    assert missing == []


def test_help_pages_name_no_input_that_is_gone(nodes: dict[str, Any]) -> None:
    for key, node in nodes.items():
        named = set(re.findall(r"^- \*\*(\w+)\*\*", help_page(key), re.MULTILINE))
        assert named == {*inputs(node), *node["output_name"]}, key


def test_advanced_inputs_are_called_so(nodes: dict[str, Any]) -> None:
    for key, node in nodes.items():
        advanced = {name for name, options in inputs(node).items() if options.get("advanced")}
        assert advanced == set(re.findall(r"^- \*\*(\w+)\*\* \(advanced\)", help_page(key), re.MULTILINE)), key


def test_each_node_has_a_row_in_the_readme(nodes: dict[str, Any]) -> None:
    rows = re.findall(r"^\| (.+?) \| `(\w+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {key: name for name, key in rows} == {key: node["display_name"] for key, node in nodes.items()}


def test_the_server_serves_the_help_page(nodes: dict[str, Any], server: Server) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for key in nodes:
        with direct.open(f"{server.url}/extensions/{PACK_NAME}/docs/{key}.md", timeout=30) as answer:
            assert answer.read().decode() == help_page(key)
