"""Block Swap inside the host: bit for bit the model that it was made from, whatever streams and whatever goes wrong.

The checks are in `swap_checks.py` (runs), `swap_patch_checks.py` (patches), `swap_life_checks.py` (memory, files and
failures) and `swap_host_checks.py` (flags, controlnets, caches), and for every architecture in
`swap_architectures.py`; one process runs each of them in one host.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from host.check_scripts import CLASSIC_RUNS, checks_in
from host.test_architectures import NAMES
from host.test_model import files, outcomes  # noqa: F401  (fixtures)
from pack.tools.versions import HOSTS, MAIN_HOST

HERE = Path(__file__).parent
CHECKS = checks_in("swap_checks.py", "swap_patch_checks.py", "swap_life_checks.py", "swap_host_checks.py")


@pytest.mark.parametrize(("script", "check"), CHECKS)
@pytest.mark.parametrize(("version", "mode"), CLASSIC_RUNS)
def test_block_swap(outcomes, script: Path, version: str, mode: str, check: str) -> None:  # noqa: F811
    failure = outcomes(script, version, mode, check)
    assert not failure, failure


@pytest.fixture(scope="session")
def compared(run_in_host, tmp_path_factory: pytest.TempPathFactory):
    """What `swap_architectures.py` says of one architecture in one host; runs it when the host is first asked for."""
    done: dict[str, dict[str, dict]] = {}

    def result(version: str, name: str) -> dict:
        if version not in done:
            folder = str(tmp_path_factory.mktemp("swapped"))
            printed = run_in_host(HERE / "swap_architectures.py", folder, *NAMES[version], version=version)
            lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"architecture"')]
            done[version] = {line["architecture"]: line for line in lines}
        return done[version][name]

    return result


@pytest.mark.parametrize(("version", "name"), [(version, name) for version in HOSTS for name in NAMES[version]])
def test_streamed_architecture_is_the_same(compared, version: str, name: str) -> None:
    found = compared(version, name)
    assert "error" not in found, found["error"]
    for kind in ("gguf", "safetensors"):
        assert found[kind]["finite"]
        for plan in ("none", "quarter", "half", "all", "least"):
            assert found[kind][plan]["equal"], f"{kind}: {plan}"
        assert found[kind]["none"]["share"] == 0 and found[kind]["all"]["share"] == 1
        assert 0 < found[kind]["quarter"]["blocks"] <= found[kind]["half"]["blocks"] <= 1


def test_a_quarter_streams_of_many_architectures(compared) -> None:
    """Most tiny models have too few blocks for that."""
    shares = [compared(MAIN_HOST, name)["gguf"]["quarter"]["blocks"] for name in NAMES[MAIN_HOST]]
    assert sum(0.2 <= share < 0.4 for share in shares) >= 8, shares
