"""`dev.py gpu`: every check is in one part, no program outlives its time, and none that dies does so unnoticed."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import psutil
import pytest
from pack.tools import gpu_checks, side_by_side
from pack.tools.host import Host
from pack.tools.side_by_side import Outcome, Part

HOST = Host(Path(sys.executable), Path("ComfyUI"), ours=False)


def run(tmp_path: Path, *parts: Part, seconds: float = 60, jobs: int = 3) -> list[Outcome]:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return side_by_side.run(parts, jobs=jobs, seconds=seconds, out=out, place=tmp_path, env=dict(os.environ))


def python(name: str, source: str, *words: str, limit: float = 60, checks: tuple[str, ...] = ()) -> Part:
    return Part(name, (sys.executable, "-c", source, *words), 1, limit, checks)


def said(check: str, failure: str = "") -> str:
    return f"print({json.dumps(json.dumps({'check': check, 'failure': failure, 'seconds': 1.0}))}, flush=True)\n"


# --- what is run


def test_every_check_of_every_script_is_in_one_part_of_each_mode(tmp_path: Path) -> None:
    parts = list(gpu_checks.parts(HOST, tmp_path, gpu_checks.MODES, 2))
    assert len({part.name for part in parts}) == len(parts)
    for mode in gpu_checks.MODES:
        for path in gpu_checks.scripts(mode):
            checks = sorted(re.findall(r"^def check_(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
            assert checks, path
            mine = [part for part in parts if f"{path.stem} {mode}" == " ".join(part.name.split()[:2])]
            assert sorted(check for part in mine for check in part.checks) == checks
            for part in mine:
                found = [check for check in checks if re.search(part.command[-1], check)]
                assert found == sorted(part.checks)


def test_scripts_are_those_with_a_mode_for_the_gpu() -> None:
    names, dynamic = ({path.stem for path in gpu_checks.scripts(mode)} for mode in gpu_checks.MODES)
    assert {path.stem for path in gpu_checks.scripts("classic")} == names
    assert names - dynamic == {"stage_checks", "release_checks"}
    assert {"model_checks", "patch_checks", "lora_checks", "swap_life_checks", "unified_checks"} <= names
    assert {"multigpu_checks"} == names & set(gpu_checks.TWO_GPUS) == set(gpu_checks.TWO_GPUS)
    assert not names & {"clip_checks", "mmproj_checks", "save_checks"}


def test_two_gpus_are_for_who_has_them(tmp_path: Path) -> None:
    names = {part.name for part in gpu_checks.parts(HOST, tmp_path, gpu_checks.MODES, 1)}
    assert not any(name.startswith("multigpu") for name in names)
    assert any(name.startswith("swap_checks gpu-dynamic") for name in names)


def test_every_test_file_that_knows_the_gpu_is_run(tmp_path: Path) -> None:
    """Also those of which all tests use it where it is there."""
    selected = {part.name.split()[0]: part.command for part in gpu_checks.parts(HOST, tmp_path, (), 1)}
    assert {"test_streamer_cuda", "test_kernels", "test_skinny", "test_unified", "test_quantize"} <= selected.keys()
    assert "cuda" in selected["test_quantize"] and "cuda" not in selected["test_skinny"]
    assert "test_gguf_reader" not in selected


def test_known_durations_are_of_checks_that_exist() -> None:
    texts = [path.read_text(encoding="utf-8") for path in gpu_checks.scripts("gpu-classic")]
    assert not [check for check in gpu_checks.CHECKS if not any(f"def check_{check}(" in text for text in texts)]
    assert not [name for name in gpu_checks.TEST_FILES if not (gpu_checks.TESTS / name).exists()]


def test_shares_take_about_the_same_time() -> None:
    checks = [*gpu_checks.CHECKS, *(f"short {n}" for n in range(40))]
    shares = gpu_checks.shared_out(checks)
    assert sorted(check for share in shares for check in share) == sorted(checks)
    times = [sum(gpu_checks.CHECKS.get(check, gpu_checks.CHECK) for check in share) for share in shares]
    assert len(shares) > 3 and max(times) - min(times) < 5 and max(times) <= gpu_checks.AT_ONCE + 5


def test_what_lies_on_the_path_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["one", "two"]))
    assert gpu_checks.environment(HOST)["PYTHONPATH"] == os.pathsep.join(["one", "two"])


# --- how they are run


def test_programs_run_at_once_and_say_how_their_checks_ended(tmp_path: Path) -> None:
    # Each of two waits for what the other one writes.
    source = "import sys, time, pathlib\nmine, other = map(pathlib.Path, sys.argv[1:])\nmine.touch()\n"
    source += "while not other.exists(): time.sleep(0.01)\n" + said("fine") + said("broken", "ValueError: why")
    one, two = run(tmp_path, python("one", source, "a", "b"), python("two", source, "b", "a"))
    for outcome in (one, two):
        assert outcome.failures == {"broken": "ValueError: why"} and not outcome.ending
        assert outcome.count("passed") == 1 and outcome.count("failed") == 1
    assert not side_by_side.report([one, two], tmp_path, 1.0)


def test_a_program_that_dies_is_a_failure_with_its_last_words(tmp_path: Path) -> None:
    source = said("first") + "import os\nprint('the driver fell off', flush=True)\nos._exit(7)"
    (outcome,) = run(tmp_path, python("dies", source, checks=("first", "second")))
    assert list(outcome.failures) == ["not run: second"]
    assert "exit status 7" in outcome.ending and "the driver fell off" in outcome.ending
    (silent,) = run(tmp_path, python("dies", "import os; os._exit(7)"))
    assert list(silent.failures) == ["(the process)"]


def test_a_program_and_its_children_end_with_their_time(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    source = f"import subprocess, sys, time, pathlib\nchild = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    source += "pathlib.Path('child').write_text(str(child.pid))\n" + said("first") + "time.sleep(600)"
    (outcome,) = run(tmp_path, python("hangs", source, limit=3, checks=("first", "second")))
    assert outcome.count("passed") == 1 and list(outcome.failures) == ["not run: second"]
    assert "ended after 3 s" in outcome.ending
    pid, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    hang = "import time; time.sleep(600)"
    outcomes = run(tmp_path, python("one", hang), python("two", hang, checks=("a", "b")), seconds=1, jobs=1)
    assert [outcome.part.name for outcome in outcomes] == ["one", "two"]
    assert sorted("ended after" in outcome.ending for outcome in outcomes) == [False, True]
    assert all(outcome.failures for outcome in outcomes) and not side_by_side.report(outcomes, tmp_path, 1.0)


def test_each_works_on_its_own_copy_of_the_files(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "model").write_text("whole")
    source = "import sys, pathlib\nfile = pathlib.Path(sys.argv[1], 'model')\nassert file.read_text() == 'whole'\n"
    source += "assert pathlib.Path('model').exists()\nfile.unlink()\n" + said("first")
    command = (sys.executable, "-c", source, "{folder}")
    outcomes = run(tmp_path, *(Part(f"part {n}", command, 1, 60, ("first",), files) for n in range(3)))
    assert not any(outcome.failures for outcome in outcomes), outcomes
    assert (files / "model").read_text() == "whole"


TESTS = """
import pytest

@pytest.mark.parametrize("number", range(7))
def test_number(number):
    assert number != 5, "five"

@pytest.mark.skip
def test_skipped(): ...

@pytest.fixture
def broken():
    raise OSError("no such thing")

def test_broken(broken): ...
"""


def test_shares_of_tests_are_all_of_them_once(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    script = str(Path(gpu_checks.__file__).with_name("share_tests.py"))
    words = ("{results}", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_some.py")
    parts = [Part(f"some {n}", (sys.executable, script, str(n), "3", *words), 1, 60) for n in range(3)]
    outcomes = run(tmp_path, *parts)
    names = [line["check"] for outcome in outcomes for line in outcome.lines]
    assert sorted(names) == sorted([*(f"test_number[{n}]" for n in range(7)), "test_broken", "test_skipped"])
    failures = {name: text for outcome in outcomes for name, text in outcome.failures.items()}
    assert failures.keys() == {"test_number[5]", "test_broken"}
    assert "five" in failures["test_number[5]"] and "no such thing" in failures["test_broken"]
    assert [sum(outcome.count(how) for outcome in outcomes) for how in ("passed", "skipped")] == [6, 1]
    assert not any(outcome.ending for outcome in outcomes if not outcome.failures)
