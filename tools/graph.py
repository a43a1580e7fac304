"""A workflow file as ComfyUI's frontend saves it, from nodes that are named by their type and inputs.

What a file repeats of each node's definition (sockets, widgets in order, defaults, outputs) comes from the server's
`/object_info`, so that a workflow says only what it is about.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from .workflow import SEED_WIDGETS

Info = dict[str, Any]

DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a combo whose choices may bring further inputs
WIDGETS = {"COMBO", DYNAMIC, "STRING", "BOOLEAN", "INT", "FLOAT"}
NOTE = "MarkdownNote"  # the frontend's own; the server does not know it
OPTIONAL = 7  # the socket's shape
VERSION = 0.4

# Sizes as the frontend draws them, in pixels.
WIDTH, GAP, TITLE, ROW, TEXT = 340, 60, 60, 26, 130
NOTE_ROW, CHARACTERS = 16, 70  # of a line of a note
LINK = re.compile(r"\[([^]]+)\]\([^)]+\)")  # in Markdown, of which the first part is shown


def inputs_of(definition: Info) -> dict[str, tuple[str, Info, bool]]:
    """A node type's inputs in the frontend's order: name -> (type, options, optional). A list for a type is a combo."""
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in definition["input"].get(group, {}).items():
            described = dict(options[0]) if options else {}
            if isinstance(kind, list):
                kind, described["options"] = "COMBO", kind
            found[name] = (kind, described, group == "optional")
    return found


def is_widget(kind: str, options: Info) -> bool:
    return kind in WIDGETS and not options.get("forceInput")


def default_of(kind: str, options: Info) -> Any:
    if "default" in options:
        return options["default"]
    if kind == DYNAMIC:
        return options["options"][0]["key"]
    return options["options"][0] if kind == "COMBO" else {"STRING": "", "BOOLEAN": False}.get(kind, 0)


class Node:
    """A node of a `Graph`; `node[1]` is its second output, the node itself its first."""

    def __init__(self, number: int, saved: Info) -> None:
        self.number, self.saved = number, saved

    def __getitem__(self, output: int) -> tuple[Node, int]:
        return self, output


class Graph:
    """Nodes in columns from left to right, each below the one before."""

    def __init__(self, definitions: Info, name: str) -> None:
        self._definitions = definitions
        self._name = name
        self._nodes: list[Info] = []
        self._links: list[list[Any]] = []
        self._groups: list[Info] = []
        self._x, self._y, self._width = 0, 0, WIDTH

    def column(self, title: str, width: int = WIDTH) -> None:
        """Begin the next column; its title is shown as that of a group."""
        if self._groups:
            self._close_group()
            self._x += self._width + GAP
        self._y, self._width = TITLE, width
        self._groups.append({"id": len(self._groups) + 1, "title": title, "flags": {}})

    def note(self, text: str, title: str = "Note") -> None:
        shown = (LINK.sub(r"\1", line) for line in text.splitlines())
        height = NOTE_ROW * (4 + sum(1 + len(line) // CHARACTERS for line in shown))
        self._append(NOTE, title, [], [], [text], height, "")

    def add(self, kind: str, title: str | None = None, **given: Any) -> Node:
        """A node with these widget values and links, the others at their defaults.

        Raises:
            ValueError: an input that this type does not have, or a required one that is missing.
        """
        definition = self._definitions[kind]
        known = inputs_of(definition)
        if unknown := given.keys() - known.keys():
            raise ValueError(f"{kind} has no input {', '.join(sorted(unknown))}; it has {', '.join(known)}")
        number = len(self._nodes) + 1
        sockets: list[Info] = []
        widgets: list[Info] = []
        values: list[Any] = []
        for name, (type_, options, optional) in known.items():
            shape = {"shape": OPTIONAL} if optional else {}
            if is_widget(type_, options):
                widgets.append({"name": name, "type": type_, "widget": {"name": name}, "link": None, **shape})
                values.append(given.get(name, default_of(type_, options)))
                if name in SEED_WIDGETS and options.get("control_after_generate"):
                    values.append("randomize")
            elif name in given or optional:
                link = self._link(given[name], number, len(sockets)) if given.get(name) is not None else None
                sockets.append({"name": name, "type": type_, "link": link, **shape})
            else:
                raise ValueError(f"{kind} needs {name}")
        outputs = [
            {"name": name, "type": type_, "links": None}
            for name, type_ in zip(definition["output_name"], definition["output"], strict=True)
        ]
        texts = sum(bool(options.get("multiline")) for _, options, _ in known.values())
        rows = max(len(sockets), len(outputs)) + len(values)
        pack = "comfyui-sluice" if kind.startswith("Sluice") else "comfy-core"
        made = self._append(
            kind,
            title or definition["display_name"],
            [*sockets, *widgets],
            outputs,
            values,
            ROW * rows + texts * TEXT,
            pack,
        )
        return Node(number, made)

    def saved(self) -> Info:
        """The whole file's content."""
        self._close_group()
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, self._name)),
            "revision": 0,
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": self._nodes,
            "links": self._links,
            "groups": self._groups,
            "config": {},
            "extra": {},
            "version": VERSION,
        }

    def _append(
        self, kind: str, title: str, inputs: list[Info], outputs: list[Info], values: list[Any], height: int, pack: str
    ) -> Info:
        made = {
            "id": len(self._nodes) + 1,
            "type": kind,
            "pos": [self._x, self._y],
            "size": [self._width, height],
            "flags": {},
            "order": len(self._nodes),
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            "title": title,
            "properties": {"Node name for S&R": kind, "cnr_id": pack} if pack else {},
            "widgets_values": values,
        }
        self._nodes.append(made)
        self._y += height + GAP
        return made

    def _link(self, source: Node | tuple[Node, int], target: int, socket: int) -> int:
        node, output = source if isinstance(source, tuple) else (source, 0)
        slot = node.saved["outputs"][output]
        number = len(self._links) + 1
        self._links.append([number, node.number, output, target, socket, slot["type"]])
        slot["links"] = [*(slot["links"] or []), number]
        return number

    def _close_group(self) -> None:
        self._groups[-1]["bounding"] = [self._x - 20, 0, self._width + 40, self._y - GAP + 40]
