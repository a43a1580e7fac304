"""Offload Mode and Release Memory inside the host (`stage_checks.py`), and as users meet them (HTTP API)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from host.test_model import files, outcomes  # noqa: F401  (fixtures)
from pack.tools.versions import HOSTS, MAIN_HOST

SCRIPT = Path(__file__).parent / "stage_checks.py"
CHECKS = re.findall(r"^def check_(\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
RUNS = [
    *((version, "classic") for version in HOSTS),
    (MAIN_HOST, "granted"),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("version", "mode"), RUNS)
def test_stages(outcomes, version: str, mode: str, check: str) -> None:  # noqa: F811
    failure = outcomes(SCRIPT, version, mode, check)
    assert not failure, failure
