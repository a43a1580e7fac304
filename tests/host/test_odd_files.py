"""Files whose models have parts that need special care: modules of the host's own, optional parts, refused files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pack.tools.gpu_checks import checks_of

SCRIPT = Path(__file__).with_name("odd_files.py")
CHECKS = checks_of(SCRIPT)


@pytest.fixture(scope="session")
def outcomes(run_in_host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    lines = run_in_host(SCRIPT, str(tmp_path_factory.mktemp("odd"))).splitlines()
    results = [json.loads(line) for line in lines if line.startswith('{"check"')]
    return {r["check"]: r["failure"] for r in results}


@pytest.mark.parametrize("check", CHECKS)
def test_odd_file(outcomes: dict[str, str], check: str) -> None:
    assert not outcomes[check], outcomes[check]
