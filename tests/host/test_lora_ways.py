"""What each way of adding a LoRA does and leaves, under both of the host's patchers; the checks are in
lora_way_checks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from host.check_scripts import RUNS, checks_in
from host.test_model import files, outcomes  # noqa: F401  (fixtures)

# Between the oldest and the newest of the hosts nothing changed that LoRAs depend on.
LORA_RUNS = [run for run in RUNS if "0.24.0" not in run]


@pytest.mark.parametrize(("script", "check"), checks_in("lora_way_checks.py"))
@pytest.mark.parametrize(("version", "mode"), LORA_RUNS)
def test_lora_way(outcomes, script: Path, version: str, mode: str, check: str) -> None:  # noqa: F811
    failure = outcomes(script, version, mode, check)
    assert not failure, failure
