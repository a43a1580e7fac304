"""Offload Mode and Release Memory inside the host (`stage_checks.py`, `release_checks.py`); as users meet them, see
`test_stages_api.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from host.check_scripts import checks_in
from host.test_model import files, outcomes  # noqa: F401  (fixtures)
from pack.tools.versions import HOSTS, MAIN_HOST

CHECKS = checks_in("stage_checks.py", "release_checks.py")
RUNS = [
    *((version, "classic") for version in HOSTS),
    (MAIN_HOST, "granted"),
    pytest.param(MAIN_HOST, "gpu-classic", marks=pytest.mark.cuda),
]


@pytest.mark.parametrize(("script", "check"), CHECKS)
@pytest.mark.parametrize(("version", "mode"), RUNS)
def test_stages(outcomes, script: Path, version: str, mode: str, check: str) -> None:  # noqa: F811
    failure = outcomes(script, version, mode, check)
    assert not failure, failure
