"""Everything that only a GPU can show, side by side: `python dev.py gpu [-- OPTIONS]`.

The unit tests that use a GPU, in shares, and the check scripts of tests/host/ under the host's two patchers, a few
checks a process: one that a bad kernel has spoilt takes few others along. What takes longest starts first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import side_by_side
from .host import CACHE, ROOT, Host
from .side_by_side import Part
from .steps import SetupError, say

TESTS = ROOT / "tests"
TWO_GPUS = ("multigpu_checks",)
MODES = ("gpu-classic", "gpu-dynamic")
GPU_MEMORY = 4 << 30  # bytes that one process may take at worst, most of it the driver's and the allocator's

# Seconds on an H200 with 16 cores, everything side by side; results.json of a run has them anew.
START = 12.0  # of a process: imports, the first kernels
CHECK = 2.0  # of a check that is not named here
CHECKS = {
    "compiles_whole_and_once": 26.0,
    "fifty_cycles_leave_nothing": 14.0,
    "changed_file_is_an_error_and_no_crash": 13.0,
    "both_compute_and_the_latent_is_equal": 12.0,
    "compiles_with_a_lora": 10.0,
    "every_way_equals_core_on_dense_weights": 8.0,
    "cancelled_wherever_loading_looks": 8.0,
    "lora_before_and_after_block_swap": 8.0,
    "changed_file_is_an_error_at_the_next_run": 7.0,
    "model_on_a_chosen_device": 6.0,
    "compiled_by_the_host": 6.0,
    "hooks_equal_core_and_leave_nothing": 5.0,
    "every_plan_gives_the_same_latent": 5.0,
    "clones_with_other_patches_in_turn": 5.0,
    "skipped_repeated_and_early_ended_blocks": 5.0,
}
TEST_FILE = 8.0
TEST_FILES: dict[str, dict[str, float]] = {  # seconds by what pytest's -k selects
    # Programs that no GPU has run yet may spoil their process: they have some of their own.
    "test_skinny.py": {"not tiles": 480.0, "tiles": 120.0},
    "test_kernels.py": {"": 90.0},
    "test_few_rows_on_gpu.py": {"": 75.0},
    "test_lora_folded.py": {"": 75.0},
    "test_unified.py": {"": 75.0},
    "test_streamer_cuda.py": {"": 32.0},
}
AT_ONCE = 40.0  # seconds of checks that one process is given


def parts(host: Host, folder: Path, modes: Sequence[str], gpus: int) -> Iterator[Part]:
    """All there is to run; `folder` has the files of `demo_files.py`."""
    share = str(ROOT / "tools" / "share_tests.py")
    for path in sorted(TESTS.glob("test_*.py")):
        if (selection := _tests_on_gpu(path)) is not None:
            for words, seconds in TEST_FILES.get(path.name, {"": TEST_FILE}).items():
                count = math.ceil(seconds / AT_ONCE)
                which = ("{results}", "-q", "-p", "no:cacheprovider", *selection, "-k", words, str(path))
                for index in range(count):
                    tests = (str(host.python), share, str(index), str(count), *which)
                    yield _part(f"{path.stem} {words}".strip(), index, count, tests, seconds / count)
    for mode in modes:
        for script in scripts(mode):
            if script.stem in TWO_GPUS and gpus < 2 and mode.startswith("gpu"):
                continue
            shares = shared_out(checks_of(script))
            for index, checks in enumerate(shares):
                command = tuple(host.command(script, "{folder}", mode, f"^(?:{'|'.join(checks)})$"))
                seconds = sum(map(_seconds, checks))
                yield _part(f"{script.stem} {mode}", index, len(shares), command, seconds, checks, folder)


def scripts(mode: str) -> list[Path]:
    """The scripts of checks that pytest would run in a mode for the GPU; in another, those that have any for it."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((TESTS / "host").glob("test_*.py"))]
    word = mode if mode in MODES else "gpu-classic"
    # In words, or among those that tests/host/check_scripts.py has for several of them.
    with_mode = re.compile(rf'"{word}"|^from host\.check_scripts import .*RUNS\b', re.MULTILINE)
    names = {name: None for text in texts if with_mode.search(text) for name in re.findall(r'"(\w+_checks\.py)"', text)}
    return [TESTS / "host" / name for name in names]


def checks_of(script: Path) -> list[str]:
    """The names of a script's checks."""
    return re.findall(r"^def check_(\w+)", script.read_text(encoding="utf-8"), re.MULTILINE)


def shared_out(checks: Sequence[str]) -> list[tuple[str, ...]]:
    """The checks of one script for as many processes as they deserve, with about the same time for each."""
    count = math.ceil(sum(map(_seconds, checks)) / AT_ONCE)
    shares: list[list[str]] = [[] for _ in range(count)]
    for check in sorted(checks, key=_seconds, reverse=True):
        min(shares, key=lambda share: sum(map(_seconds, share))).append(check)
    return [tuple(share) for share in shares]


def _seconds(check: str) -> float:
    return CHECKS.get(check, CHECK)


def _tests_on_gpu(path: Path) -> tuple[str, ...] | None:
    """What selects the tests of a file that use a GPU where there is one; None if none does."""
    text = path.read_text(encoding="utf-8")
    if re.search(r"\bDEVICE\b", text):  # all of them, on whatever there is
        return ()
    return ("-m", "cuda") if "mark.cuda" in text else None


def _part(
    name: str,
    index: int,
    count: int,
    command: tuple[str, ...],
    seconds: float,
    checks: tuple[str, ...] = (),
    folder: Path | None = None,
) -> Part:
    name = f"{name} {index + 1}/{count}" if count > 1 else name
    expected = START + seconds
    return Part(name, command, expected, 60 + 5 * expected, checks, folder)


def environment(host: Host) -> dict[str, str]:
    """The host's, with the packages that PYTHONPATH brings where nothing is installed, and few threads each."""
    brought = () if host.ours else tuple(Path(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    return {**host.env(brought), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}


def _gpus(host: Host, env: dict[str, str]) -> list[int]:
    """The bytes of memory of each NVIDIA GPU."""
    probe = (
        "import json, torch; count = torch.cuda.device_count() if torch.cuda.is_available() else 0;"
        "print(json.dumps([torch.cuda.get_device_properties(n).total_memory for n in range(count)]))"
    )
    done = subprocess.run([str(host.python), "-c", probe], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SetupError(f"{host.python} cannot import torch:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def run(host: Host, arguments: Sequence[str]) -> int:
    """Run them and print a table; the exit status is 0 only if all passed."""
    args = _parse(arguments)
    start, env = time.monotonic(), environment(host)
    gpus = _gpus(host, env)
    if not gpus and any(mode.startswith("gpu") for mode in args.modes):
        raise SetupError(f"{host.python} sees no NVIDIA GPU. `-- --modes classic` runs the scripts on the CPU.")
    fitting = max(1, min(gpus) // GPU_MEMORY) if gpus else 2
    jobs = args.jobs or min(os.cpu_count() or 1, fitting)
    folder = args.out / "files"
    chosen = [part for part in parts(host, folder, args.modes, len(gpus)) if args.only.search(part.name)]
    if not chosen:
        raise SetupError(f"--only {args.only.pattern}: no part's name has that")
    folder.mkdir(parents=True, exist_ok=True)
    if any(part.folder for part in chosen) and not (folder / "lora.safetensors").exists():  # written last
        subprocess.run(host.command(TESTS / "host" / "demo_files.py", str(folder)), env=env, check=True)
    say(f"{len(chosen)} parts, {jobs} at a time, on {len(gpus)} GPUs; raw output in {args.out}")
    outcomes = side_by_side.run(
        chosen, jobs=jobs, seconds=args.limit - (time.monotonic() - start), out=args.out, place=ROOT, env=env
    )
    return 0 if side_by_side.report(outcomes, args.out, time.monotonic() - start) else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py gpu --", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", type=re.compile, default="", help="parts whose name has it")
    parser.add_argument("--modes", nargs="+", default=MODES, help="of the scripts: %(default)s; classic needs no GPU")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes at a time; as many as cores and memory allow")
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for all of it (%(default)s)")
    parser.add_argument("--out", type=Path, default=CACHE / "gpu", help="the folder for raw output")
    args = parser.parse_args(arguments)
    args.out = args.out.absolute()
    return args
