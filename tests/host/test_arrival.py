"""Models that the host loads whole and the GPU fetches through locked pages, inside the host (`arrival_checks.py`)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from host.test_model import files, outcomes  # noqa: F401  (fixtures)
from pack.tools.versions import HOSTS, MAIN_HOST

SCRIPT = Path(__file__).with_name("arrival_checks.py")
CHECKS = re.findall(r"^def check_(\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
RUNS = [
    *((version, "classic") for version in HOSTS),
    pytest.param(MAIN_HOST, "gpu-classic", marks=pytest.mark.cuda),
    pytest.param(MAIN_HOST, "gpu-dynamic", marks=pytest.mark.cuda),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("version", "mode"), RUNS)
def test_arrival(outcomes, version: str, mode: str, check: str) -> None:  # noqa: F811
    failure = outcomes(SCRIPT, version, mode, check)
    assert not failure, failure
