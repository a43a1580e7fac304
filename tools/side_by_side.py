"""Run several programs side by side, each within its own time, and collect what their checks said.

A program says how a check ended by one line of JSON, `{"check": NAME, "failure": TEXT, "seconds": S}`, in its output or
in a file; TEXT is empty where the check passed, and `"skipped": true` says that it did not run.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import process_groups
from .steps import say

TAIL = 30  # lines of a failure, and of the output of a process that died


@dataclass(frozen=True)
class Part:
    """A program to run: its raw output goes to NAME.txt, and what it says of its checks may go to NAME.jsonl."""

    name: str
    command: tuple[str, ...]  # with {folder} and {results} in the place of what is made for it
    expected_seconds: float
    limit_seconds: float
    checks: tuple[str, ...] = ()  # what it must say something about; of what else it says, nothing is asked
    folder: Path | None = None  # copied for it, and where it runs, as `{folder}`; else it runs in `place`


@dataclass
class Outcome:
    """How one part ended."""

    part: Part
    seconds: float = 0.0
    ending: str = ""  # what went wrong with the process itself
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failures(self) -> dict[str, str]:
        found = {line["check"]: line["failure"] for line in self.lines if line["failure"]}
        said = {line["check"] for line in self.lines}
        silent = [check for check in self.part.checks if check not in said]
        if silent or (self.ending and not found):
            found["not run: " + ", ".join(silent) if silent else "(the process)"] = self.ending or "nothing was said"
        return found

    def count(self, ending: str) -> int:
        return {
            "passed": sum(not line["failure"] and not line.get("skipped") for line in self.lines),
            "skipped": sum(bool(line.get("skipped")) for line in self.lines),
            "failed": len(self.failures),
        }[ending]


class _Running:
    """A part whose process runs."""

    def __init__(self, part: Part, out: Path, place: Path, env: dict[str, str], scratch: Path) -> None:
        self.part = part
        stem = part.name.replace(" ", "-").replace("/", "-of-")
        self.output, self.results = out / f"{stem}.txt", out / f"{stem}.jsonl"
        self.results.unlink(missing_ok=True)
        self.folder = scratch / stem
        if part.folder:
            shutil.copytree(part.folder, self.folder)
        places = {"{folder}": str(self.folder), "{results}": str(self.results)}
        self.started = time.monotonic()
        command, home = [places.get(word, word) for word in part.command], self.folder if part.folder else place
        with self.output.open("wb") as file:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            options = {**streams, **process_groups.GROUP}
            self.process: subprocess.Popen[bytes] = subprocess.Popen(command, env=env, cwd=home, **options)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def ended(self, deadline: float) -> Outcome | None:
        """None while it runs and may."""
        status = self.process.poll()
        if status is None:
            limit = min(self.part.limit_seconds, deadline - self.started)
            if self.seconds() < limit:
                return None
            return self._outcome(f"ended after {limit:.0f} s, its limit")
        return self._outcome(f"exit status {status}" if status else "")

    def _outcome(self, ending: str) -> Outcome:
        seconds = self.seconds()
        self.stop()
        lines = list(_lines(self.output)) + list(_lines(self.results))
        if ending:
            tail = self.output.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
            ending = "\n".join([ending, *(line[:500] for line in tail if not line.startswith('{"check"'))])
        return Outcome(self.part, seconds, ending, lines)

    def stop(self) -> None:
        process_groups.kill(self.process)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it
            self.process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith('{"check"'):
                with contextlib.suppress(ValueError):  # cut off, where the process was ended in it
                    yield json.loads(line)


def run(
    parts: Sequence[Part], *, jobs: int, seconds: float, out: Path, place: Path, env: dict[str, str]
) -> list[Outcome]:
    """Run all parts, those that take longest first, `jobs` at a time and all of them within `seconds`."""
    deadline = time.monotonic() + seconds
    waiting = sorted(parts, key=lambda part: part.expected_seconds)
    running: list[_Running] = []
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and time.monotonic() < deadline:
                    running.append(_Running(waiting.pop(), out, place, env, Path(scratch)))
                for one in list(running):
                    if outcome := one.ended(deadline):
                        running.remove(one)
                        outcomes.append(outcome)
                        failed = outcome.count("failed")
                        say(f"{one.part.name}: {f'{failed} FAILED' if failed else 'passed'}, {outcome.seconds:.0f} s")
                if time.monotonic() > deadline and not running:
                    outcomes += [Outcome(part, ending="not started: the time was over") for part in waiting]
                    break
                time.sleep(0.05)
        finally:
            for one in running:
                one.stop()
    names = [part.name for part in parts]
    return sorted(outcomes, key=lambda outcome: names.index(outcome.part.name))


def report(outcomes: Sequence[Outcome], out: Path, seconds: float) -> bool:
    """Print a table and then every failure; return whether all is well."""
    wide = max(len(outcome.part.name) for outcome in outcomes)
    print(f"{'':{wide}}  passed  failed  skipped  seconds  expected")
    for outcome in outcomes:
        passed, failed, skipped = (outcome.count(ending) for ending in ("passed", "failed", "skipped"))
        times = f"{outcome.seconds:7.1f}  {outcome.part.expected_seconds:8.0f}"
        print(f"{outcome.part.name:{wide}}  {passed:6}  {failed or '-':>6}  {skipped or '-':>7}  {times}")
    failures = [(outcome.part.name, *found) for outcome in outcomes for found in outcome.failures.items()]
    for part, check, text in failures:
        print(f"\n--- {part}: {check}\n" + "\n".join(text.strip().splitlines()[-TAIL:]))
    rows = [{"part": outcome.part.name, **line} for outcome in outcomes for line in outcome.lines]
    (out / "results.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
    total = sum(outcome.count("passed") for outcome in outcomes)
    print(f"\n{total} passed, {len(failures)} failed, {seconds:.0f} s; raw output in {out}")
    for part, check, _ in failures:
        print(f"FAILED {part}: {check}"[:300])
    return not failures
