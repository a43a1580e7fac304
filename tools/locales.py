"""locales/: what ComfyUI's frontend shows of our nodes, in its users' languages: `.venv/bin/python tools/locales.py`.

English is written from the node definitions of a real server and from web/js (settings.js, live/english.js); the other
languages are written by hand, and this says what they lack and what is left over in them. A test fails as long as this
would write or say anything.

The layout is the host's (app/custom_node_manager.py): `locales/LANGUAGE/nodeDefs.json`, node id -> display_name,
description, inputs and outputs, and `settings.json`, setting -> name, tooltip and options by their English text. In
`main.json` the headings of the settings are where the frontend looks for them, and the live view's words are ours
(web/js/live/words.js).
Outputs that are called like their type (MODEL) are left to the host.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if "pack" not in sys.modules:  # run as a script
    sys.modules["pack"] = types.ModuleType("pack")
    sys.modules["pack"].__path__ = [str(ROOT)]

FOLDER = ROOT / "locales"
SETTINGS = ROOT / "web" / "js" / "settings.js"
WORDS = ROOT / "web" / "js" / "live" / "english.js"
SOURCE = "en"
LANGUAGES = (SOURCE, "zh", "ja", "ko", "de", "fr", "es")
SLOTS = ("required", "optional")
NODES_FILE, SETTINGS_FILE, MAIN_FILE = FILES = ("nodeDefs", "settings", "main")
HEADINGS, OURS = "settingsCategories", "sluice"  # the parts of main.json


def english(definitions: Mapping[str, Any]) -> dict[str, Any]:
    """nodeDefs.json of the definitions of our nodes, as the server gives them in /object_info."""
    found = {}
    for key, node in sorted(definitions.items()):
        slots = {name: options for group in SLOTS for name, (_, *options) in node["input"].get(group, {}).items()}
        inputs = {name: {"name": name, "tooltip": options[0]["tooltip"]} for name, options in slots.items()}
        kinds = [kind if isinstance(kind, str) else "COMBO" for kind in node["output"]]
        named = zip(node["output_name"], kinds, strict=True)
        outputs = {str(i): {"name": name} for i, (name, kind) in enumerate(named) if name != kind}
        found[key] = {"display_name": node["display_name"], "description": node["description"], "inputs": inputs}
        if outputs:
            found[key]["outputs"] = outputs
    return found


_LITERAL = r'"(?:[^"\\]|\\.)*"'
_TEXT = rf"\s*((?:{_LITERAL}[\s+]*)+)"  # also in pieces


def english_settings(script: str) -> dict[str, Any]:
    """settings.json of the settings that a script registers."""
    found = {}
    for setting in re.split(r"(?=\bid: \")", script)[1:]:
        key, name = (json.loads(text) for text in re.findall(rf"\b(?:id|name): ({_LITERAL})", setting)[:2])
        texts: dict[str, Any] = {"name": name}
        if tooltip := re.search(rf"\btooltip:{_TEXT}", setting):
            texts["tooltip"] = _joined(tooltip[1])
        if options := [json.loads(text) for text in re.findall(rf"\btext: ({_LITERAL})", setting)]:
            texts["options"] = {_key(option): option for option in options}
        found[_key(key)] = texts
    return found


def english_main(settings: str, words: str) -> dict[str, Any]:
    """main.json of the scripts of the settings, whose headings stand between the pack and the setting, and of words."""
    categories = [json.loads(found) for found in re.findall(r"\bcategory: (\[.*\])", settings)]
    headings = {_key(heading): heading for _, *between, _ in categories for heading in between}
    table = words[words.index("export const ENGLISH") :]
    ours = {name: _joined(text) for name, text in re.findall(rf"^  (\w+):{_TEXT},$", table, re.MULTILINE)}
    return {HEADINGS: headings, OURS: ours}


def _joined(pieces: str) -> str:
    return "".join(map(json.loads, re.findall(_LITERAL, pieces)))


def english_of_scripts() -> dict[str, dict[str, Any]]:
    """By file, what comes from web/js."""
    settings, words = (script.read_text(encoding="utf-8") for script in (SETTINGS, WORDS))
    return {SETTINGS_FILE: english_settings(settings), MAIN_FILE: english_main(settings, words)}


def _key(text: str) -> str:
    """As the frontend looks a text up."""
    return text.replace(".", "_")


def path_of(language: str, name: str = NODES_FILE) -> Path:
    return FOLDER / language / f"{name}.json"


def written(texts: Mapping[str, Any]) -> str:
    return json.dumps(texts, indent=2, ensure_ascii=False) + "\n"


def load(language: str, name: str = NODES_FILE) -> dict[str, Any]:
    path = path_of(language, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def leaves(texts: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a file with its place, in the file's order."""
    for key, value in texts.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*place, key))
        else:
            yield (*place, key), value


def complaints(source: Mapping[str, Any], translation: Mapping[str, Any]) -> list[str]:
    """What a translation lacks and what is left over in it."""
    wanted, given = dict(leaves(source)), dict(leaves(translation))
    lacks = [f"lacks {'.'.join(place)}: {text}" for place, text in wanted.items() if not given.get(place, "").strip()]
    return lacks + [f"has {'.'.join(place)}, which is gone" for place in given if place not in wanted]


def ours(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The definitions of this pack's nodes."""
    from pack.tools.server import PACK_NAME

    return {key: node for key, node in object_info.items() if node["python_module"] == f"custom_nodes.{PACK_NAME}"}


def main() -> int:
    from pack.tools import host
    from pack.tools.server import Server

    with tempfile.TemporaryDirectory() as base, Server(host.find(), Path(base), "--cpu") as server:
        nodes = english(ours(server.object_info()))
    made = {NODES_FILE: nodes, **english_of_scripts()}
    lines = []
    for name, source in made.items():
        path_of(SOURCE, name).parent.mkdir(parents=True, exist_ok=True)
        path_of(SOURCE, name).write_text(written(source), encoding="utf-8")
        lines += [f"{path_of(to, name)} {line}" for to in LANGUAGES for line in complaints(source, load(to, name))]
    print(*lines, sep="\n", end="\n" if lines else "")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
