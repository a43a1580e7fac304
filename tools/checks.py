"""`dev.py test`: every stage runs even when an earlier one failed; pytest is last, so its closing line is too."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence

from .host import CACHE, ROOT, Host
from .steps import say

STAGES = (
    ("lint", ("-m", "ruff", "check", ".")),
    ("format", ("-m", "ruff", "format", "--check", ".")),
    ("types", ("-m", "mypy", ".")),
)


def run(host: Host, pytest_arguments: Sequence[str]) -> int:
    """Run all stages and return an exit status that is 0 only if each passed."""
    failed = []
    for name, command in STAGES:
        start = time.monotonic()
        say(f"{name} ...")
        status = subprocess.call([str(host.python), *command], cwd=ROOT, env=host.env())
        say(f"{name}: {'FAILED' if status else 'passed'}, {time.monotonic() - start:.1f} s")
        failed += [name] if status else []
    if failed:
        say(f"failed so far: {', '.join(failed)}; now the tests")
    # Through its function, not `python -m pytest`, which would put the checkout first on the path: its nodes/ would
    # then hide ComfyUI's nodes.py.
    pytest = (
        str(host.python),
        "-c",
        "import sys, pytest; sys.path[:] = filter(None, sys.path); sys.exit(pytest.main(sys.argv[1:]))",
    )
    env = {**host.env(), "HYPOTHESIS_STORAGE_DIRECTORY": str(CACHE / "hypothesis")}
    if not host.ours:
        env["COMFYUI_PATH"] = str(host.comfyui)
    status = subprocess.call([*pytest, *pytest_arguments], cwd=ROOT, env=env)
    return status or int(bool(failed))
