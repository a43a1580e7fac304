"""Every name that the host knows a weight by takes an adapter to the weight that the host takes it to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pack.tools.versions import HOSTS

SCRIPT = Path(__file__).with_name("lora_dialects.py")
# For nearly all of these the host has names of their own.
MODELS = (
    *("flux", "flux2", "chroma", "sd3", "sdxl", "qwen_image", "z_image", "lumina2", "aura", "pixart_sigma"),
    *("wan21_t2v", "ltxv", "hunyuan_video", "anima", "kandinsky5"),
)
ENCODERS = ("t5_xxl", "umt5_base", "qwen25_7b", "gemma2")


@pytest.fixture(scope="session")
def compared(run_in_host, tmp_path_factory: pytest.TempPathFactory):
    """What the script says of one network in one host; runs it when the host is first asked for."""
    done: dict[str, dict[str, dict]] = {}

    def result(version: str, name: str) -> dict:
        if version not in done:
            printed = run_in_host(SCRIPT, str(tmp_path_factory.mktemp("tiny")), *MODELS, *ENCODERS, version=version)
            lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"architecture"')]
            done[version] = {line["architecture"]: line for line in lines}
        return done[version][name]

    return result


@pytest.mark.parametrize("name", (*MODELS, *ENCODERS))
@pytest.mark.parametrize("version", HOSTS)
def test_every_name_of_the_hosts_is_known(compared, version: str, name: str) -> None:
    found = compared(version, name)
    assert "error" not in found, found["error"]
    assert found["names"] > 50 and found["wrong"] == []
