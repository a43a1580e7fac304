"""What a model of more than 4 GB costs in time and host memory: to open it, to build the MODEL, to run it, to let go.

    python dev.py bench load_memory
    python dev.py bench load_memory -- --city96 DIR/ComfyUI-GGUF --quick

A GGUF in the shapes of FLUX.1-dev (fewer blocks, Q8_0, random) is written to a temporary folder. Each loader then runs
in a process of its own: one sampling step of a 64 x 64 picture on the device that the host chooses. Before each, the
file is dropped from the page cache where the system can, so that both find it on the disk.

Memory is told apart by what it costs. *Anonymous* memory belongs to the process alone and can only be swapped. *File*
memory is the page cache's, mapped: the system takes it back whenever it needs it. On Linux these are the kernel's
numbers (smaps_rollup), elsewhere what psutil calls unique or private is taken for the anonymous part. The peak is that
of anonymous memory within a stage, seen every 10 ms.

Beside ours:

- `gguf-py`: city96's approach, re-enacted (`_gguf_py_loader.py` says from which facts).
- `city96`: their pack itself, when its folder is given.

Without a GPU all of them leave the weights in the mapping, and differ by the header alone. With one, `unloaded` is
the stage to look at: there the host takes the model off the device while the workflow still holds it. On a CPU ours
keeps the room for one dense weight, the largest, from the first step until the MODEL goes (`loaders/quant/scratch.py`).

The second table is the header alone: a file whose vocabulary has 262,144 tokens, as a text encoder's has.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
BLOCKS = (5, 15)  # double and single: 4.2 GB in Q8_0
QUICK_BLOCKS = (1, 2)
VOCABULARY = 1 << 18
SMAPS = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True)
class Memory:
    """Bytes of this process that are in RAM."""

    anonymous: int
    file: int
    shared: int

    @staticmethod
    def now() -> Memory:
        if SMAPS.exists():
            fields = dict(line.split(":") for line in SMAPS.read_text().splitlines()[1:])
            rss, anonymous, shared = (1024 * int(fields[k].split()[0]) for k in ("Rss", "Anonymous", "Pss_Shmem"))
            return Memory(anonymous, rss - anonymous - shared, shared)
        import psutil

        found = psutil.Process().memory_full_info()
        own = getattr(found, "private", None) or found.uss
        return Memory(own, max(0, found.rss - own), getattr(found, "shared", 0))


class Stages:
    """Times named pieces of work and says what memory the process has after each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.add("start", 0.0, None)

    def add(self, stage: str, seconds: float, peak: int | None) -> None:
        self.rows.append({"stage": stage, "seconds": seconds, "peak_anonymous": peak, **asdict(Memory.now())})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        seen, done = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(seen, done), daemon=True)
        watcher.start()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        gc.collect()
        self.add(name, seconds, seen[0] or None)


def _watch(seen: list[int], done: threading.Event) -> None:
    status = Path("/proc/self/status")  # reading smaps_rollup would hold up whoever maps memory
    while status.exists() and not done.wait(0.01):
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        seen[0] = max(seen[0], 1024 * int(fields["RssAnon"].split()[0]))


# --- one loader in a process of its own


def start_host() -> Any:
    """Import the host as its main.py does, on the CPU where there is nothing better; return its `nodes`."""
    import torch

    sys.argv = ["main.py"] if torch.cuda.is_available() or torch.backends.mps.is_available() else ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.sd

    # The host's; a type checker takes it for the pack's own folder.
    return importlib.import_module("nodes")


def sluice(path: Path, stages: Stages) -> Any:
    from pack.loaders.diffusion import load_diffusion_model
    from pack.loaders.gguf.reader import GGUFFile

    with stages.stage("opened"), GGUFFile(path):
        pass
    with stages.stage("MODEL built"):
        return load_diffusion_model(path)


def gguf_py(path: Path, stages: Stages) -> Any:
    from pack.benchmarks import _gguf_py_loader

    with stages.stage("opened"):
        tensors = _gguf_py_loader.state_dict(path)
    with stages.stage("MODEL built"):
        return _gguf_py_loader.model(tensors)


def city96(path: Path, stages: Stages, folder: Path) -> Any:
    """Their node, found and called as the host does; it opens and builds in one."""
    import asyncio

    import folder_paths

    nodes = sys.modules["nodes"]
    folder_paths.add_model_folder_path("unet", str(path.parent))
    folder_paths.add_model_folder_path("unet_gguf", str(path.parent))
    if not asyncio.run(nodes.load_custom_node(str(folder))):
        raise SystemExit(f"{folder} does not load as a custom node")
    loader = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]()
    with stages.stage("MODEL built"):
        return loader.load_unet(path.name)[0]


def run_model(path: Path, load: Callable[[Path, Stages], Any]) -> dict[str, Any]:
    start_host()
    import comfy.model_management
    import comfy.sample
    import torch

    stages = Stages()
    model = load(path, stages)
    torch.manual_seed(0)
    noise = torch.randn(1, 16, 8, 8)
    condition = [[torch.randn(1, 32, 4096) * 0.1, {"pooled_output": torch.randn(1, 768) * 0.1, "guidance": 3.5}]]
    for run in ("first step", "next step"):
        with stages.stage(run):
            latent = comfy.sample.sample(
                model, noise, 1, 1.0, "euler", "simple", condition, condition, torch.zeros_like(noise),
                disable_pbar=True, seed=1,
            )  # fmt: skip
        assert bool(latent.isfinite().all())
    with stages.stage("unloaded"):
        comfy.model_management.unload_all_models()
    with stages.stage("MODEL dropped"):
        del model
        comfy.model_management.cleanup_models_gc()
    return {"rows": stages.rows, "device": str(comfy.model_management.get_torch_device())}


# --- the header alone


def write_vocabulary(path: Path) -> None:
    """Tokens, scores and types, as a converted Gemma or T5 has them, and one small tensor."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_token_list([f"▁token{i}" for i in range(VOCABULARY)])
    writer.add_token_scores([-float(i) for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_header(path: Path, reader: str) -> dict[str, Any]:
    if reader == "sluice":
        from pack.loaders.gguf.reader import GGUFFile as Reader
    else:
        from gguf import GGUFReader as Reader
    stages = Stages()
    with stages.stage("opened"):
        opened = Reader(path)
    assert len(opened.tensors) == 1
    return {"rows": stages.rows}


# --- all of them


def in_process(role: str, path: Path, city96_folder: Path | None) -> dict[str, Any]:
    """Run one loader in a process of its own, with the file on the disk and not in the page cache."""
    if hasattr(os, "posix_fadvise") and path.exists():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "answer.json")
        given = ["--role", role, "--path", str(path), "--answer", str(answer)]
        given += ["--city96", str(city96_folder)] if city96_folder else []
        # As this process was started: `launch.py --pack COMFYUI SCRIPT`.
        launcher = [sys.executable, str(Path(__file__).parents[1] / "tools" / "launch.py"), "--pack", sys.path[0]]
        done = subprocess.run([*launcher, __file__, *given], capture_output=True, text=True, errors="replace")
        if not answer.exists():
            raise SystemExit(f"{role} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))


def work(args: argparse.Namespace) -> None:
    """The part of a child process."""
    kind, _, name = args.role.partition(":")
    if kind == "make":
        start_host()
        from gguf import GGMLQuantizationType
        from pack.benchmarks import _model_files

        blocks = QUICK_BLOCKS if name == "quick" else BLOCKS
        size = _model_files.write(args.path, GGMLQuantizationType.Q8_0, "flux", _model_files.flux(*blocks))
        with args.path.open("rb+") as file:
            os.fsync(file.fileno())  # dirty pages cannot be dropped
        result: dict[str, Any] = {"bytes": size}
    elif kind == "vocabulary":
        write_vocabulary(args.path)
        result = {"bytes": args.path.stat().st_size}
    elif kind == "header":
        result = run_header(args.path, name)
    else:
        loaders: dict[str, Callable[[Path, Stages], Any]] = {
            "sluice": sluice,
            "gguf-py": gguf_py,
            "city96": lambda path, stages: city96(path, stages, args.city96),
        }
        result = run_model(args.path, loaders[name])
    args.answer.write_text(json.dumps(result), encoding="utf-8")


def table(name: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{name:<10} {'stage':<14} {'s':>7} {'anonymous MB':>13} {'peak':>7} {'file MB':>9} {'shared MB':>10}"]
    for row in rows:
        peak = "" if row["peak_anonymous"] is None else f"{row['peak_anonymous'] / 1e6:.0f}"
        lines.append(
            f"{'':<10} {row['stage']:<14} {row['seconds']:>7.2f} {row['anonymous'] / 1e6:>13.0f} {peak:>7} "
            f"{row['file'] / 1e6:>9.0f} {row['shared'] / 1e6:>10.0f}"
        )
    return lines


def added_by_loading(rows: list[dict[str, Any]]) -> float:
    """MB of anonymous memory from the start until the MODEL is built."""
    after = next(row for row in rows if row["stage"] == "MODEL built")
    return (after["anonymous"] - rows[0]["anonymous"]) / 1e6


def hardware() -> dict[str, Any]:
    import psutil
    import torch

    model = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        model = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), "")
    return {
        "cpu": f"{model or platform.machine()}, {os.cpu_count()} cores",
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--city96", type=Path, help="the folder of ComfyUI-GGUF, to run it too")
    parser.add_argument("--quick", action="store_true", help="a file of 0.7 GB, and write no results")
    parser.add_argument("--folder", type=Path, help="where the temporary files go; it needs 5 GB")
    for hidden in ("--role", "--path", "--answer"):
        parser.add_argument(hidden, type=str if hidden == "--role" else Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return work(args)

    report: dict[str, Any] = {**hardware(), "models": {}, "headers": {}}
    text = ["python dev.py bench load_memory"]
    text += [f"{key}: {report[key]}" for key in ("cpu", "ram_gb", "gpu", "system", "torch") if report[key]]
    print("\n".join(text), flush=True)

    def tell(lines: list[str]) -> None:
        text.extend(lines)
        print("\n".join(lines), flush=True)

    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        path = Path(scratch, "flux.gguf")
        report["model_bytes"] = in_process(f"make:{'quick' if args.quick else 'full'}", path, None)["bytes"]
        tell(["", f"a FLUX-shaped Q8_0 model of {report['model_bytes'] / 1e9:.2f} GB, one step of 64 x 64 pixels"])
        for name in ("sluice", "gguf-py", *(["city96"] if args.city96 else [])):
            result = in_process(f"model:{name}", path, args.city96)
            report["device"] = result["device"]
            report["models"][name] = {"rows": result["rows"], "added_by_loading_mb": added_by_loading(result["rows"])}
            tell(table(name, result["rows"]))
            tell([f"{'':<10} loading added {added_by_loading(result['rows']):.1f} MB of anonymous memory", ""])
        path.unlink()

        path = Path(scratch, "vocabulary.gguf")
        size = in_process("vocabulary:", path, None)["bytes"]
        tell([f"the header of a file with {VOCABULARY} tokens ({size / 1e6:.1f} MB), median of 3"])
        for name in ("sluice", "gguf-py"):
            runs = [in_process(f"header:{name}", path, None)["rows"] for _ in range(3)]
            seconds = statistics.median(rows[1]["seconds"] for rows in runs)
            added = statistics.median(rows[1]["anonymous"] - rows[0]["anonymous"] for rows in runs) / 1e6
            report["headers"][name] = {"seconds": seconds, "anonymous_mb": added}
            tell([f"{name:<10} {seconds:8.3f} s, {added:7.1f} MB of anonymous memory"])
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "load_memory.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "load_memory.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
