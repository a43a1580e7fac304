"""A loaded GGUF model inside the host: exact, zero-copy, honest about its size, under both of the host's patchers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from host import demo_files
from host.check_scripts import RUNS, checks_in

CHECKS = checks_in("model_checks.py", "patch_checks.py")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as Q4_0/Q5_1, the same numbers in float32, and its LoRA."""
    return demo_files.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def outcomes(files: Path, run_in_host):
    """Run all checks of one script, host and mode once, when the first of them is asked for."""
    done: dict[tuple[Path, str, str], dict[str, str]] = {}

    def outcome(script: Path, version: str, mode: str, check: str) -> str:
        if (script, version, mode) not in done:
            lines = run_in_host(script, str(files), mode, version=version).splitlines()
            results = [json.loads(line) for line in lines if line.startswith('{"check"')]
            done[script, version, mode] = {r["check"]: r["failure"] for r in results}
        return done[script, version, mode][check]

    return outcome


@pytest.mark.parametrize(("script", "check"), CHECKS)
@pytest.mark.parametrize(("version", "mode"), RUNS)
def test_model(outcomes, script: Path, version: str, mode: str, check: str) -> None:
    failure = outcomes(script, version, mode, check)
    assert not failure, failure
