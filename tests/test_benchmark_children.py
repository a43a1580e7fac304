"""The parts of a benchmark end with it, even where it is killed, and answer as usual where it is not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PART = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import _children
_children.end_with_parent()
if len(sys.argv) > 2:
    open(sys.argv[2], "w").write(str(os.getpid()))
    time.sleep(600)
print("done", sys.stdin.isatty())
"""
PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
import _children
done = _children.run([sys.executable, "-c", *sys.argv[2:]], capture_output=True, text=True)
print(done.returncode, done.stdout.strip())
"""


def command(*args: object) -> list[str]:
    return [sys.executable, "-c", PARENT, str(BENCHMARKS), PART, str(BENCHMARKS), *map(str, args)]


def test_a_part_runs_to_its_end() -> None:
    done = subprocess.run(command(), capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0 done False", done


def test_a_part_ends_when_the_benchmark_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    parent = subprocess.Popen(command(told))
    try:
        _until(lambda: told.exists() and told.read_text())
        part = psutil.Process(int(told.read_text()))
        assert part.is_running()
    finally:
        parent.kill()
        parent.wait()
    _until(lambda: not part.is_running() or part.status() == psutil.STATUS_ZOMBIE)


def test_a_part_that_a_user_starts_needs_no_parent() -> None:
    own = [sys.executable, "-c", PART, str(BENCHMARKS)]
    done = subprocess.run(own, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("done")


def _until(true) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it went on"
        time.sleep(0.02)
