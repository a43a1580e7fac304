"""What tests that run scripts of checks share: which checks those have, and under which hosts and patchers they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pack.tools.gpu_checks import checks_of
from pack.tools.versions import HOSTS, MAIN_HOST

HERE = Path(__file__).parent

GPU_RUNS: list[Any] = [pytest.param(MAIN_HOST, mode, marks=pytest.mark.cuda) for mode in ("gpu-classic", "gpu-dynamic")]
CLASSIC_RUNS: list[Any] = [*((version, "classic") for version in HOSTS), *GPU_RUNS]
# The dynamic patcher of older hosts has other seams than the stand-in allocator covers.
RUNS: list[Any] = [*CLASSIC_RUNS, (MAIN_HOST, "granted"), (MAIN_HOST, "refused")]


def checks_in(*names: str) -> list[Any]:
    """A (script, check) for every check of the scripts of these names."""
    return [pytest.param(HERE / name, check, id=check) for name in names for check in checks_of(HERE / name)]
