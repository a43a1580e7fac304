"""The host's multi-GPU nodes on our models (`multigpu_checks.py`): with the CPU as two devices, and on two GPUs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from host.test_model import files, outcomes  # noqa: F401  (fixtures)
from pack.tools.versions import MAIN_HOST

SCRIPT = Path(__file__).with_name("multigpu_checks.py")
CHECKS = re.findall(r"^def check_(\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
RUNS = [
    *((version, "classic") for version in ("0.24.0", MAIN_HOST)),  # older ones have no such nodes
    pytest.param(MAIN_HOST, "gpu-classic", marks=pytest.mark.cuda),
    pytest.param(MAIN_HOST, "gpu-dynamic", marks=pytest.mark.cuda),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("version", "mode"), RUNS)
def test_multigpu(outcomes, version: str, mode: str, check: str) -> None:  # noqa: F811
    if mode.startswith("gpu") and torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    failure = outcomes(SCRIPT, version, mode, check)
    assert not failure, failure
