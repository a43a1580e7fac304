"""Every family of text encoders, as a tiny random model: what the host computes from the GGUF is what it computes from
a safetensors with the same numbers, bit for bit.

One process for each host version compares all of its families (`compare_encoders.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from host.tiny_encoder import ENCODERS
from pack.tools.versions import HOSTS

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("compare_encoders.py")
NAMES = {version: [name for name, tiny in ENCODERS.items() if version in tiny.hosts] for version in HOSTS}


@pytest.fixture(scope="session")
def compared(run_in_host, tmp_path_factory: pytest.TempPathFactory):
    """What `compare_encoders.py` says of one family in one host; runs it when the host is first asked for."""
    done: dict[str, dict[str, dict]] = {}

    def result(version: str, name: str) -> dict:
        if version not in done:
            folder = str(tmp_path_factory.mktemp("text"))
            printed = run_in_host(SCRIPT, folder, *NAMES[version], version=version, timeout=1800)
            lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"encoder"')]
            done[version] = {line["encoder"]: line for line in lines}
        return done[version][name]

    return result


@pytest.mark.parametrize(("version", "name"), [(version, name) for version in HOSTS for name in NAMES[version]])
def test_hidden_states_equal_the_hosts(compared, version: str, name: str) -> None:
    found = compared(version, name)
    assert "error" not in found, found["error"]
    assert found["classes"][0] == found["classes"][1]
    assert found["same_tokens"]
    assert found["finite"]
    assert found["spread"] > 0.01
    assert found["equal"], f"largest difference {found['difference']}"
    # And from a GGUF with the host's own names instead of llama.cpp's.
    assert found["equal_by_names"]
    # A weight of the file is in use: the result changes when that weight is zero.
    assert found["difference_without_probe"] > 0, found["probe"]
    # The encoder holds the file's blocks, and no operation made a whole weight dense behind our back.
    assert found["quantised"] > 0
    assert found["bytes"]["ours"] < found["bytes"]["theirs"] * 0.95
    assert found["fallbacks"] == []
    # Nor of a table of words as a whole, which a watcher would have seen.
    assert found["tables"]
    assert {name: seen for name, seen in found["tables"].items() if seen != [False, True]} == {}
