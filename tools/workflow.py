"""From a workflow as the frontend saves it to the form that the server's API takes.

The saved file lists a node's widget values in order; its inputs that carry a `widget` entry name them in the same
order.  The frontend adds one value that belongs to itself: what to do with a seed after each run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SEED_WIDGETS = ("seed", "noise_seed")
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")
NOTES = ("Note", "MarkdownNote")  # the frontend's own; the server never gets them


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def widget_values(node: dict[str, Any]) -> dict[str, Any]:
    """A node's widget values by name."""
    values = list(node.get("widgets_values", []))
    named = {}
    for slot in node.get("inputs", []):
        if "widget" not in slot:
            continue
        name = slot["widget"]["name"]
        if not values:
            raise ValueError(f"node {node['id']} ({node['type']}) has no value for its widget {name!r}")
        named[name] = values.pop(0)
        if name in SEED_WIDGETS and values and values[0] in AFTER_GENERATE:
            values.pop(0)
    if values:
        raise ValueError(f"node {node['id']} ({node['type']}) has values without a widget: {values}")
    return named


def to_api(saved: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The API form of a saved workflow: per node its type, its widget values and where its inputs come from."""
    origins = {link[0]: [str(link[1]), link[2]] for link in saved["links"]}
    prompt = {}
    for node in saved["nodes"]:
        if node["type"] in NOTES:
            continue
        linked = {
            slot["name"]: origins[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None
        }
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": {**widget_values(node), **linked}}
    return prompt


def set_widget(saved: dict[str, Any], title: str, name: str, value: Any) -> None:
    """Change one widget of the node with this title."""
    (node,) = [node for node in saved["nodes"] if node.get("title") == title]
    place = list(widget_values(node)).index(name)
    seeds = [i for i, widget in enumerate(widget_values(node)) if widget in SEED_WIDGETS]
    place += sum(1 for i in seeds if i < place)  # each seed is followed by the frontend's own value
    node["widgets_values"][place] = value
