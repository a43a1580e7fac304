"""What a user sets in ComfyUI's dialog reaches the pack, and what makes no sense does no harm."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pack.tools.host import ROOT
from pack.tools.versions import HOSTS

# Given, by JSON, what the file holds, one after the other; prints what `settings.current()` makes of each.
SCRIPT = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
import comfy.cli_args
comfy.cli_args.args.cpu = True
import folder_paths
folder_paths.set_user_directory(os.getcwd())
from pack.nodes import settings
path = Path("default", settings.FILE)
path.parent.mkdir()
told = [asdict(settings.current())]
for number, text in enumerate(json.loads(sys.argv[1])):
    path.write_text(text)
    os.utime(path, ns=(number, number))
    told.append({**asdict(settings.current()), "request": asdict(settings.current().swap_request())})
comfy.cli_args.args.multi_user = True
told.append(asdict(settings.current()))
print(json.dumps(told))
"""
DEFAULTS = {"weight_source": "auto", "reserve_gb": 0.5, "unified_memory": "off", "log_level": "info"}
CHOSEN = {"weight_source": "pinned", "reserve_gb": 2, "unified_memory": "auto", "log_level": "warning"}
NO_SENSE: dict[str, list[Any]] = {
    "weight_source": ["memory", "", 3, ["auto"], {}],
    "reserve_gb": [-1, 5000, "1", True, None, float("nan")],
    "unified_memory": ["on", 1, ["off"]],
    "log_level": ["loud", 10, ["info"], {}],
}
BROKEN = ["", "{", "[]", "null", '"sluice.reserve_gb"']


def stored(values: dict[str, Any]) -> str:
    return json.dumps({f"sluice.{name}": value for name, value in values.items()} | {"Comfy.ColorPalette": "dark"})


@pytest.fixture(scope="module")
def told(run_in_host) -> list[dict[str, Any]]:
    nonsense = [stored({name: value}) for name, values in NO_SENSE.items() for value in values]
    files = [stored(CHOSEN), *BROKEN, *nonsense, stored({"reserve_gb": 1.5})]
    return json.loads(run_in_host(SCRIPT, json.dumps(files)).splitlines()[-1])


def test_defaults_count_without_a_file(told: list[dict[str, Any]]) -> None:
    assert told[0] == DEFAULTS


def test_what_is_chosen_counts(told: list[dict[str, Any]]) -> None:
    request = told[1].pop("request")
    assert told[1] == CHOSEN
    assert request["weight_source"] == "pinned" and request["min_free_vram_gb"] == 2
    assert request["vram_budget_gb"] == 0 and request["blocks_to_swap"] == -1


def test_what_makes_no_sense_is_the_default(told: list[dict[str, Any]]) -> None:
    for settings in told[2:-2]:
        assert {name: settings[name] for name in DEFAULTS} == DEFAULTS
    assert len(told) == 4 + len(BROKEN) + sum(map(len, NO_SENSE.values()))


def test_a_later_change_counts(told: list[dict[str, Any]]) -> None:
    assert {name: told[-2][name] for name in DEFAULTS} == {**DEFAULTS, "reserve_gb": 1.5}


def test_a_server_of_several_users_keeps_the_defaults(told: list[dict[str, Any]]) -> None:
    assert told[-1] == DEFAULTS


def test_the_dialog_offers_what_the_server_takes(run_in_host) -> None:
    """The names and the words of web/js/settings.js, which no Python reads otherwise."""
    text = (ROOT / "web" / "js" / "settings.js").read_text(encoding="utf-8")
    names = [line.split('"')[1] for line in text.splitlines() if line.strip().startswith("id: ")]
    assert sorted(names) == sorted(f"sluice.{name}" for name in DEFAULTS)
    entries = {part.split('"')[1]: part for part in text.split("      id: ")[1:]}
    offered = {
        name: [line.split('value: "')[1].split('"')[0] for line in entry.splitlines() if "value: " in line]
        for name, entry in entries.items()
    }
    asked = [[name.removeprefix("sluice."), word] for name, words in offered.items() for word in words]
    assert len(asked) == 4 + 3 + 3
    script = (
        "import json, sys, comfy.cli_args\ncomfy.cli_args.args.cpu = True\nfrom pack.nodes.settings import SENSIBLE\n"
    )
    script += "print([pair for pair in json.loads(sys.argv[1]) if not SENSIBLE[pair[0]](pair[1])])"
    assert run_in_host(script, json.dumps(asked)).splitlines()[-1] == "[]"


@pytest.mark.parametrize("version", HOSTS)
def test_details_are_shown_once_if_asked_for(run_in_host, version: str) -> None:
    """On the console of each host, whose own level hides them or does not."""
    script = """
import logging, sys
import comfy.cli_args
comfy.cli_args.args.cpu = True
from app.logger import setup_logger
setup_logger(log_level="INFO")
from pack.nodes import settings
log = logging.getLogger("sluice.test")
for level in ("debug", "info", "warning", "debug"):
    settings._set_log_level(level)
    for told in ("debug", "info", "warning"):
        getattr(log, told)(f"<{level}:{told}>")
"""
    said = run_in_host("import sys; sys.stderr = sys.stdout\n" + script, version=version)
    expected = ["debug:debug", "debug:info", "debug:warning", "info:info", "info:warning", "warning:warning"]
    times = dict.fromkeys(expected, 1) | dict.fromkeys(expected[:3], 2)  # debug was chosen twice
    assert {one: said.count(f"<{one}>") for one in expected} == times
    assert not any(f"<{hidden}>" in said for hidden in ("info:debug", "warning:debug", "warning:info"))
