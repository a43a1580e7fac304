"""Processes that end with everything they started.

Each gets a group of its own, so that ending it also ends its children, and Ctrl-C reaches it through us alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any

if sys.platform == "win32":
    GROUP: dict[str, Any] = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}

    def terminate(process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.CTRL_BREAK_EVENT)

    def kill(process: subprocess.Popen[bytes]) -> None:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)

else:
    GROUP = {"start_new_session": True}

    def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # the whole group has ended
            os.killpg(process.pid, number)

    def terminate(process: subprocess.Popen[bytes]) -> None:
        _signal(process, signal.SIGTERM)

    def kill(process: subprocess.Popen[bytes]) -> None:
        _signal(process, signal.SIGKILL)
