"""A text encoder from a GGUF inside the host: mapped, patched at use, never dense, under both of its patchers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pack.tools.gpu_checks import checks_of
from pack.tools.versions import HOSTS, MAIN_HOST

SCRIPT = Path(__file__).with_name("clip_checks.py")
CHECKS = checks_of(SCRIPT)
# The dynamic patcher of older hosts has other seams than the stand-in allocator covers.
RUNS = [*((version, "classic") for version in HOSTS), (MAIN_HOST, "granted"), (MAIN_HOST, "refused")]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory, run_in_host):
    """Run all checks in one host and mode once, when the first of them is asked for."""
    done: dict[tuple[str, str], dict[str, str]] = {}

    def outcome(version: str, mode: str, check: str) -> str:
        if (version, mode) not in done:
            folder = tmp_path_factory.mktemp("clip")
            lines = run_in_host(SCRIPT, str(folder), mode, version=version).splitlines()
            results = [json.loads(line) for line in lines if line.startswith('{"check"')]
            done[version, mode] = {r["check"]: r["failure"] for r in results}
        return done[version, mode][check]

    return outcome


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("version", "mode"), RUNS)
def test_text_encoder(outcomes, version: str, mode: str, check: str) -> None:
    failure = outcomes(version, mode, check)
    assert not failure, failure
