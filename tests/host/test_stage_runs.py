"""Offload Mode inside the host, on further ways through a workflow (`stage_run_checks.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from host.check_scripts import checks_in
from host.test_model import files, outcomes  # noqa: F401  (fixtures)
from pack.tools.versions import MAIN_HOST

CHECKS = checks_in("stage_run_checks.py")


@pytest.mark.parametrize(("script", "check"), CHECKS)
def test_stages(outcomes, script: Path, check: str) -> None:  # noqa: F811
    failure = outcomes(script, MAIN_HOST, "classic", check)
    assert not failure, failure
