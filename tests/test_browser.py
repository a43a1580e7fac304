"""The browser that the live view is tested with is found, or its absence is told with what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pack.tools import browser
from pack.tools.host import ROOT
from pack.tools.steps import SetupError


def program(path: Path, text: str = "exit 0") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A system without a browser; programs may be put into the folder."""
    monkeypatch.delenv("SLUICE_BROWSER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(browser, "USUAL_PLACES", (str(tmp_path / "usual" / "chrome"),))
    return tmp_path


def test_none_is_an_error_that_says_what_to_do(nowhere: Path) -> None:
    with pytest.raises(SetupError, match=r"there is no browser: .*[Cc]hrom.*SLUICE_BROWSER"):
        browser.find()


@pytest.mark.skipif(sys.platform == "win32", reason="programs are scripts here")
def test_what_is_there_is_found(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = program(nowhere / "usual" / "chrome")
    assert browser.find() == str(usual)
    on_path = program(nowhere / "bin" / "chromium")
    assert browser.find() == str(on_path)
    named = program(nowhere / "usual" / "mine")
    monkeypatch.setenv("SLUICE_BROWSER", str(named))
    assert browser.find() == str(named)
    monkeypatch.setenv("SLUICE_BROWSER", str(nowhere / "gone"))
    with pytest.raises(SetupError, match=r"no browser at .*gone"):
        browser.find()


@pytest.mark.skipif(sys.platform == "win32", reason="it is a shell script")
@pytest.mark.parametrize(
    ("present", "apt_status", "asked", "told"),
    [(True, 0, False, False), (False, 0, True, False), (False, 100, True, True)],
    ids=["has a browser", "gets one", "cannot get one"],
)
def test_ci_gets_a_browser(tmp_path: Path, present: bool, apt_status: int, asked: bool, told: bool) -> None:
    """`.ci/run` with programs that stand for the system's: what it asks of them, and that the tests run in any case."""
    folder = tmp_path / "bin"
    program(folder / "apt-get", f'echo "$DEBIAN_FRONTEND apt-get $*" >> {tmp_path}/asked; exit {apt_status}')
    program(folder / "sudo", 'shift; exec "$@"')
    program(folder / "python3", "echo tests: $*")
    for name in ("bash", "dirname", "id"):
        (folder / name).symlink_to(next(p for p in (Path("/usr/bin", name), Path("/bin", name)) if p.exists()))
    if present:
        program(folder / "chromium")
    env = {name: value for name, value in os.environ.items() if name != "SLUICE_BROWSER"} | {"PATH": str(folder)}
    done = subprocess.run([ROOT / ".ci" / "run"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "tests: dev.py test\n")
    assert (tmp_path / "asked").exists() == asked
    if asked:
        lines = (tmp_path / "asked").read_text().splitlines()
        assert all(line.startswith("noninteractive apt-get ") for line in lines)
        assert apt_status or "chromium" in lines[-1]
    assert ("could not install Chromium" in done.stderr) == told
