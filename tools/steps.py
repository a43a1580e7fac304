"""Set-up as a list of steps that remember that they ran.

A step's stamp holds a hash of everything its result depends on.  It is written last and in one move, so a step that
was interrupted, or whose inputs changed, runs again; one that finished costs a file read.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


class SetupError(Exception):
    """Set-up cannot go on; the message says what went wrong and what to do."""


@dataclass(frozen=True)
class Step:
    """One piece of set-up: `run` makes `makes`, and `inputs` are all that the result depends on."""

    name: str
    stamp: Path
    inputs: tuple[str, ...]
    makes: Path
    run: Callable[[], None]

    def digest(self) -> str:
        return hashlib.sha256("\0".join((self.name, *self.inputs)).encode()).hexdigest()

    def is_done(self) -> bool:
        try:
            return self.makes.exists() and self.stamp.read_text() == self.digest()
        except OSError:
            return False

    def mark_done(self) -> None:
        self.stamp.parent.mkdir(parents=True, exist_ok=True)
        partial = self.stamp.with_name(f"{self.stamp.name}.{os.getpid()}")
        partial.write_text(self.digest())
        partial.replace(self.stamp)


def run_steps(steps: Iterable[Step]) -> None:
    """Run the steps that are not done, one line each on stderr; say nothing when there is nothing to do."""
    for step in steps:
        if step.is_done():
            continue
        start = time.monotonic()
        say(f"set-up: {step.name} ...")
        step.stamp.unlink(missing_ok=True)
        step.run()
        step.mark_done()
        say(f"set-up: {step.name}, {time.monotonic() - start:.1f} s")


def say(line: str) -> None:
    """Progress goes to stderr, so that what a command prints can be piped."""
    print(line, file=sys.stderr, flush=True)
