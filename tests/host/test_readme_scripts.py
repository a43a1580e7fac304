"""What README shows for scripts works as pasted: the blocks are taken from it and run against a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pack.tools import demo, workflow
from pack.tools.host import ROOT
from pack.tools.server import Server

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMPT = "demo/demo_workflow_api.json"
DEFAULT_URL = "http://127.0.0.1:8188"


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder to run in, with the file that the scripts read."""
    (tmp_path / "demo").mkdir()
    shutil.copy(ROOT / PROMPT, tmp_path / PROMPT)
    return tmp_path


def run(command: list[str], clone: Path) -> str:
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_prompt_is_the_demo_workflow() -> None:
    assert json.loads((ROOT / PROMPT).read_text(encoding="utf-8")) == workflow.to_api(workflow.load(demo.WORKFLOW))


def test_the_python_script_fetches_the_picture(demo_server: Server, clone: Path) -> None:
    script = block("python")
    assert DEFAULT_URL in script
    told = run([sys.executable, "-c", script.replace(DEFAULT_URL, demo_server.url)], clone).splitlines()
    assert told[0] == "success"
    assert [(clone / name).read_bytes()[:8] for name in told[1:]] == [b"\x89PNG\r\n\x1a\n"]


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="needs curl and bash")
def test_the_curl_command_queues_the_prompt(demo_server: Server, clone: Path) -> None:
    command = block("bash")
    assert DEFAULT_URL in command
    answer = json.loads(run(["bash", "-c", command.replace(DEFAULT_URL, demo_server.url)], clone))
    assert answer["node_errors"] == {}
    # One prompt after the other: a picture that is asked for after it is made after it.
    demo_server.queue(demo.prompt_for("red seven on white", demo.GGUF_FILES["Q8_0"])[1])
    status = demo_server.get(f"/history/{answer['prompt_id']}")[answer["prompt_id"]]["status"]
    assert status["status_str"] == "success"
