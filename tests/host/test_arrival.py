"""Models that the host loads whole and the GPU fetches through locked pages, inside the host (`arrival_checks.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from host.check_scripts import CLASSIC_RUNS, checks_in
from host.test_model import files, outcomes  # noqa: F401  (fixtures)

CHECKS = checks_in("arrival_checks.py")


@pytest.mark.parametrize(("script", "check"), CHECKS)
@pytest.mark.parametrize(("version", "mode"), CLASSIC_RUNS)
def test_arrival(outcomes, script: Path, version: str, mode: str, check: str) -> None:  # noqa: F811
    failure = outcomes(script, version, mode, check)
    assert not failure, failure
