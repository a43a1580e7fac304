"""A model's drive that falls silent holds up what asks it, and not the server.

The server's `os.stat` waits for as long as a file `silent` lies beside it, when it is asked for the one model.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack.tools import demo, host
from pack.tools.server import Server

FILE = "far_away.gguf"
SILENT_DRIVE = """
import os, time
from pathlib import Path

stat, silent = os.stat, Path(__file__).with_name("silent")


def slow(path, *args, **kwargs):
    while str(path).endswith("far_away.gguf") and os.access(silent, os.F_OK):
        time.sleep(0.01)
    return stat(path, *args, **kwargs)


os.stat = slow
NODE_CLASS_MAPPINGS = {}
"""


@pytest.fixture(scope="module")
def far_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("far")
    drive = base / "custom_nodes" / "silent_drive"
    drive.mkdir(parents=True)
    (drive / "__init__.py").write_text(SILENT_DRIVE)
    found = host.find()
    demo.prepare_models(found)
    demo.copy_models(base / "models")
    folder = base / "models" / "diffusion_models"
    shutil.copyfile(folder / demo.GGUF_FILES["Q8_0"], folder / FILE)
    with Server(found, base, "--cpu") as running:
        yield running


@pytest.fixture
def silent(far_server: Server) -> Iterator[Path]:
    """Silent as long as it exists."""
    switch = far_server.base / "custom_nodes" / "silent_drive" / "silent"
    yield switch
    switch.unlink(missing_ok=True)


def file_of(server: Server) -> dict[str, Any]:
    found = {file["name"]: file for model in server.get("/sluice/report")["models"] for file in model["files"]}
    return found[FILE]


def test_the_report_says_what_it_cannot_say(far_server: Server, silent: Path) -> None:
    far_server.queue(demo.prompt_for("red seven on white", FILE)[1])
    there = file_of(far_server)
    assert there["state"] == "there" and there["bytes"] > 1_000_000
    silent.touch()
    while (now := file_of(far_server)) == there:  # until what is known is no longer fresh
        time.sleep(0.01)
    assert now == file_of(far_server) == {"name": FILE, "bytes": None, "state": "no answer"}
    silent.unlink()
    while (again := file_of(far_server))["state"] == "no answer":  # until the thread that waited has its answer
        time.sleep(0.01)
    assert again == there


def test_files_that_do_not_answer_leave_the_server_its_threads(far_server: Server, silent: Path) -> None:
    """Its pages are sent by threads, too. More ask than any pool has."""
    silent.touch()
    statuses: list[int] = []

    def ask() -> None:
        try:
            said = far_server.get(f"/sluice/file?folder=diffusion_models&name={FILE}")
            statuses.append(200 if said["name"] == FILE else 0)
        except urllib.error.HTTPError as refused:
            assert "has not answered" in json.loads(refused.read())["error"]
            statuses.append(refused.code)

    asking = [threading.Thread(target=ask) for _ in range(40)]
    for thread in asking:
        thread.start()
    assert far_server.get("/sluice/report")["version"] == 1
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(far_server.url, timeout=30) as page:
        assert b"<html" in page.read()
    silent.unlink()
    for thread in asking:
        thread.join()
    assert len(statuses) == len(asking) and set(statuses) <= {200, 504}
