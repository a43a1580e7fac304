"""The pack loads in every host without a warning, without network, and with what the host reads of it understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pack.tools.host import ROOT
from pack.tools.versions import HOSTS

SCRIPT = Path(__file__).with_name("startup_checks.py")

# What the test must notice.
NOISY = """
import logging, socket, warnings
logging.getLogger("noisy").warning("hello")
warnings.warn("old", DeprecationWarning)
try:
    socket.getaddrinfo("localhost", 80)
except OSError:
    pass
NODE_CLASS_MAPPINGS = {}
"""


@pytest.fixture(scope="module", params=HOSTS)
def started(run_in_host, request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(run_in_host(SCRIPT, version=request.param).splitlines()[-1])


def test_it_loads_without_a_warning(started: dict[str, Any]) -> None:
    assert started["loaded"]
    assert started["nodes"]
    assert started["said"] == []
    assert started["warnings"] == []


def test_it_reaches_for_no_network(started: dict[str, Any]) -> None:
    assert started["network"] == []


def test_its_web_folder_is_served_once(started: dict[str, Any]) -> None:
    assert started["web"] == [str(ROOT / "web")]


def test_the_host_understands_its_metadata(started: dict[str, Any]) -> None:
    project, comfy = started["config"]["project"], started["config"]["tool_comfy"]
    assert project["supported_os"] == ["OS Independent"]
    assert project["supported_accelerators"] == ["GPU :: NVIDIA CUDA"]
    assert project["supported_comfyui_version"].startswith(">=")
    assert project["urls"]["repository"].endswith(comfy["display_name"])
    assert comfy["publisher_id"]
    assert comfy["icon"].startswith("https://")


def test_the_listener_hears_what_it_listens_for(run_in_host, tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text(NOISY)
    start = f"import sys, runpy; sys.argv[1:] = [{str(tmp_path)!r}]\n"
    heard = json.loads(run_in_host(start + f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')").splitlines()[-1])
    assert heard["said"] == ["WARNING: hello"]
    assert heard["warnings"] == ["DeprecationWarning: old"]
    assert heard["network"] == ["socket.getaddrinfo"]
