"""The vision projector of a text encoder is found beside it, or missed with a sentence that helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pack.tools.gpu_checks import checks_of

SCRIPT = Path(__file__).with_name("mmproj_checks.py")
CHECKS = checks_of(SCRIPT)


@pytest.fixture(scope="session")
def failures(run_in_host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    lines = run_in_host(SCRIPT, str(tmp_path_factory.mktemp("mmproj"))).splitlines()
    results = [json.loads(line) for line in lines if line.startswith('{"check"')]
    return {result["check"]: result["failure"] for result in results}


@pytest.mark.parametrize("check", CHECKS)
def test_projector(failures: dict[str, str], check: str) -> None:
    assert not failures[check], failures[check]
