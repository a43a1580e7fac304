"""Every architecture, as a tiny random model: the latent from the GGUF is the latent that the host gets, bit for bit.

The host loads the same numbers from a safetensors with its own loader. One process for each host version compares
all of its architectures (`compare_latents.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from host.tiny_models import ARCHITECTURES
from pack.tools.versions import HOSTS

SCRIPT = Path(__file__).with_name("compare_latents.py")
NAMES = {version: [name for name, tiny in ARCHITECTURES.items() if version in tiny.hosts] for version in HOSTS}


@pytest.fixture(scope="session")
def compared(run_in_host, tmp_path_factory: pytest.TempPathFactory):
    """What `compare_latents.py` says of one architecture in one host; runs it when the host is first asked for."""
    done: dict[str, dict[str, dict]] = {}

    def result(version: str, name: str) -> dict:
        if version not in done:
            printed = run_in_host(SCRIPT, str(tmp_path_factory.mktemp("tiny")), *NAMES[version], version=version)
            lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"architecture"')]
            done[version] = {line["architecture"]: line for line in lines}
        return done[version][name]

    return result


@pytest.mark.parametrize(("version", "name"), [(version, name) for version in HOSTS for name in NAMES[version]])
def test_latent_equals_the_hosts(compared, version: str, name: str) -> None:
    found, tiny = compared(version, name), ARCHITECTURES[name]
    assert "error" not in found, found["error"]
    assert found["families"] == [tiny.family, tiny.family]
    assert found["finite"]
    assert found["spread"] > 0.01
    assert found["equal"], f"largest difference {found['difference']}"
    assert found["equal_bfloat16"] or tiny.host_follows_file, f"largest difference {found['difference_bfloat16']}"
    # A weight of the file is in use: the latent changes when that weight is zero.
    assert found["difference_without_probe"] > 0, found["probe"]
    # The model holds the file's blocks, not dense weights.
    assert found["bytes"]["ours"] < found["bytes"]["theirs"] / 2 or tiny.plain_parts, found["bytes"]
