"""Parts of a benchmark in processes of their own, which end with it however it ends.

Whoever kills a benchmark gets the GPU and its memory back. The part's standard input is a pipe that nobody writes to:
every system closes it when the process at the other end is gone, also one that was killed and could tell nobody.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

_MARK = "SLUICE_BENCHMARK_PART"  # that standard input is such a pipe


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run` of a part, which calls `end_with_parent` first."""
    reading, writing = os.pipe()
    try:
        return subprocess.run(command, stdin=reading, env={**os.environ, _MARK: "1"}, **options)
    finally:
        os.close(writing)
        os.close(reading)


def end_with_parent() -> None:
    """In a part: end at once when whoever runs it is gone; in a process that a user started, nothing."""
    if os.environ.pop(_MARK, None):  # and not for what this process starts
        threading.Thread(target=_wait, name="end with parent", daemon=True).start()


def _wait() -> None:
    os.read(0, 1)
    os._exit(1)
