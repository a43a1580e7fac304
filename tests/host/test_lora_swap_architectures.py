"""A LoRA on every quantised weight of eight architectures gives the same picture however much of the model streams."""

from __future__ import annotations

from pathlib import Path

import pytest
from host.test_lora_architectures import NAMES, by_architecture

SCRIPT = Path(__file__).with_name("lora_swap_architectures.py")


@pytest.fixture(scope="module")
def compared(run_in_host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return by_architecture(run_in_host(SCRIPT, str(tmp_path_factory.mktemp("tiny")), *NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_lora_is_the_same_on_a_streamed_model(compared: dict[str, dict], name: str) -> None:
    found = compared[name]
    assert "error" not in found, found["error"]
    for way in ("merge", "runtime"):
        assert found[f"{way}: effect"] > 0.02, "the LoRA changes nothing"
        for plan in ("quarter", "all", "least"):
            case = found[f"{way}, {plan}"]
            assert case["equal"] and case["plain_again"], (way, plan)
            assert case["streamed"] > 0 or plan == "least", "nothing streams"
