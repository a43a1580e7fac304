"""LoRAs on GGUF models inside the host, under both of its patchers; the checks are in lora_checks.py and
lora_kind_checks.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from host.test_model import RUNS, files, outcomes  # noqa: F401  (fixtures)

SCRIPTS = [Path(__file__).with_name(name) for name in ("lora_checks.py", "lora_kind_checks.py")]
# Between the oldest and the newest of the hosts nothing changed that LoRAs depend on.
LORA_RUNS = [run for run in RUNS if "0.24.0" not in run]
CHECKS = [
    pytest.param(script, check, id=check)
    for script in SCRIPTS
    for check in re.findall(r"^def check_(\w+)", script.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize(("script", "check"), CHECKS)
@pytest.mark.parametrize(("version", "mode"), LORA_RUNS)
def test_lora(outcomes, script: Path, version: str, mode: str, check: str) -> None:  # noqa: F811
    failure = outcomes(script, version, mode, check)
    assert not failure, failure
