"""A real ComfyUI for the tests: one server for the session, and scripts run inside any of the hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pack.tools import demo, host
from pack.tools.browser import browser
from pack.tools.server import Server
from pack.tools.steps import SetupError
from pack.tools.versions import MAIN_HOST

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("host")


@pytest.fixture(scope="session")
def run_in_host() -> Callable[..., str]:
    """`run_in_host(script, *args, version="0.30.0", timeout=600)`: run a file, or source, inside a host; its stdout.

    ComfyUI is first on the script's path and the checkout is importable as `pack`; tests/ comes last.
    """

    def run(script: str | Path, *args: str, version: str = MAIN_HOST, timeout: float = 600) -> str:
        try:
            found = host.find(version)
        except SetupError:
            if host.named_by_environment():
                pytest.skip(f"ComfyUI {version} is not set up beside the one that COMFYUI_PATH names")
            raise
        return found.run_script(script, *args, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI with the pack and an empty models folder (`server.models_dir`) to put files into."""
    with Server(host.find(), tmp_path_factory.mktemp("comfyui"), "--cpu") as running:
        yield running


@pytest.fixture(scope="session")
def demo_server(server: Server) -> Server:
    """The same server with the demo's models in it."""
    demo.prepare_models(server.host)
    demo.copy_models(server.models_dir)
    return server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser for the tests of one file."""
    with browser() as running:
        yield running
