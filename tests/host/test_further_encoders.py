"""Text encoders of two to four files, GGUF and safetensors mixed and in both orders, and further sizes of one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from host.further_encoders import FURTHER

pytestmark = pytest.mark.slow

FLOAT_TABLE = ("t5_xxl_ungated", "umt5_xxl")  # by the order of types in these tiny files

HERE = Path(__file__).parent
TOGETHER = ("flux", "sdxl", "sd3 with a safetensors", "hidream", "hidream with two safetensors")


@pytest.fixture(scope="module")
def together(run_in_host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    printed = run_in_host(HERE / "several_encoders.py", str(tmp_path_factory.mktemp("several")))
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"case"')]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", TOGETHER)
def test_several_files_are_one_text_encoder(together: dict[str, dict[str, Any]], case: str) -> None:
    assert together.keys() == set(TOGETHER)
    found = together[case]
    assert "error" not in found, found["error"]
    assert len(found["classes"]) == 1
    assert found["files"] == found["wanted"]
    assert min(found["spread"].values()) > 0.01
    assert found["differ"] == []


@pytest.fixture(scope="module")
def further(run_in_host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    printed = run_in_host(HERE / "further_encoders.py", str(tmp_path_factory.mktemp("further")), *FURTHER)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"encoder"')]
    return {line["encoder"]: line for line in lines}


@pytest.mark.parametrize("name", FURTHER)
def test_hidden_states_equal_the_hosts(further: dict[str, dict[str, Any]], name: str) -> None:
    found = further[name]
    assert "error" not in found, found["error"]
    assert found["classes"][0] == found["classes"][1]
    assert found["same_tokens"] and found["finite"] and found["spread"] > 0.01
    assert found["equal"], f"largest difference {found['difference']}"
    assert found["equal_by_names"]
    assert found["difference_without_probe"] > 0, found["probe"]
    assert found["quantised"] > 0 and found["fallbacks"] == []
    # Nor of a table of words as a whole, which a watcher would have seen.
    assert found["tables"] or name in FLOAT_TABLE
    assert {name: seen for name, seen in found["tables"].items() if seen != [False, True]} == {}
