"""A LoRA on every quantised weight of eight architectures equals the host's on the same weights, dense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("lora_architectures.py")
NAMES = ("flux", "sd3", "sdxl", "sd15", "qwen_image", "wan21_t2v", "ltxv", "z_image")
# In float32. Merged it is the host's arithmetic, bit for bit. Beside the weight each sum is taken in another order: at
# most 2^12 terms, each rounded by 2^-24, in two steps of a few blocks.
BOUNDS = {"merge": 0.0, "runtime": 1e-5}


def by_architecture(printed: str) -> dict[str, dict]:
    """What a script printed of each, a line of JSON."""
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"architecture"')]
    return {line["architecture"]: line for line in lines}


@pytest.fixture(scope="module")
def compared(run_in_host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return by_architecture(run_in_host(SCRIPT, str(tmp_path_factory.mktemp("tiny")), *NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_lora_equals_the_hosts(compared: dict[str, dict], name: str) -> None:
    found = compared[name]
    assert "error" not in found, found["error"]
    assert found["weights"] > 5 and found["unmatched"] == 0
    assert found["effect"] > 0.02, "the LoRA changes nothing"
    for way, bound in BOUNDS.items():
        assert found["difference"][way] <= bound, way
    assert found["repeats"] and found["plain_again"]
