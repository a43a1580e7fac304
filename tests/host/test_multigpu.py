"""The host's multi-GPU nodes on our models (`multigpu_checks.py`): with the CPU as two devices, and on two GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from host.check_scripts import GPU_RUNS, checks_in
from host.test_model import files, outcomes  # noqa: F401  (fixtures)
from pack.tools.versions import MAIN_HOST

CHECKS = checks_in("multigpu_checks.py")
RUNS = [*((version, "classic") for version in ("0.24.0", MAIN_HOST)), *GPU_RUNS]  # older ones have no such nodes


@pytest.mark.parametrize(("script", "check"), CHECKS)
@pytest.mark.parametrize(("version", "mode"), RUNS)
def test_multigpu(outcomes, script: Path, version: str, mode: str, check: str) -> None:  # noqa: F811
    if mode.startswith("gpu") and torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    failure = outcomes(script, version, mode, check)
    assert not failure, failure
