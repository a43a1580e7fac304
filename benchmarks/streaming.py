"""Block Swap against the same model resident: what a step costs for each share that streams, and its result.

    python benchmarks/streaming.py --work DIR --out results/streaming.json [--rounds 2] [CASE ...]

A case is one of `CASES`: a model's shapes, a quant type and a latent; each runs in a process of its own, in a real
ComfyUI on a GPU. Within it the rows take turns (A B A B):

    off     the model as the host's classic patcher has it, all in VRAM
    on      with Block Swap, everything fits
    N %     that share of the blocks streams, spread evenly; 100 % is everything that may stream

A step's time is the median, and in brackets the least, of the steps after those in which blocks are timed. `host` is
the part of it until the thread that computes has enqueued everything, `busy` how long that thread had a core meanwhile:
where host is nearly all of the step Python binds, and where it is longer than busy something else was in the way.
`ideal` is what a step cannot be faster than: the larger of its compute (the faster of `off` and `on`) and its streamed
bytes at the link's measured rate. `equal` is whether the latent is the same bit for bit as that of `off`, where two
runs of `off` are. Host memory is anonymous plus shared, above what the process held before the model was loaded: half
a GB of it is what torch and cuBLAS take at their first use (results/host_memory_h200.txt).

The GGUF files are random with finite scales and are written to DIR when they are missing (up to 12 GB each).
PYTHONPATH must hold ComfyUI and its packages; `dev.py bench` sees to that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

PACK = Path(__file__).resolve().parents[1]
sys.path.append(str(PACK / "benchmarks"))  # last, where it is when the parts run inside the host

import _children  # noqa: E402


@dataclass(frozen=True)
class Case:
    shapes: str  # a function of _model_files
    kind: str  # a GGML type
    latent: tuple[int, ...]
    context: tuple[int, ...]
    conditioning: dict[str, Any]
    shares: tuple[float, ...]
    steps: int = 11
    timed: int = 3  # the first steps of a run, in which blocks are timed: the times of the others count
    warm_up: int = 4  # the plan follows what was measured in those three


SHARES = (0.25, 0.5, 1.0)
POOLED = {"pooled_output": (1, 768), "guidance": 3.5}
CASES = {
    "flux": Case("flux", "Q8_0", (1, 16, 128, 128), (1, 256, 4096), POOLED, SHARES),
    "flux-256px": Case("flux", "Q8_0", (1, 16, 32, 32), (1, 256, 4096), POOLED, (1.0,)),
    "wan-video": Case("wan", "Q4_K", (1, 16, 21, 60, 104), (1, 512, 4096), {}, SHARES, steps=2, timed=1, warm_up=1),
    "qwen-image": Case("qwen_image", "Q4_K", (1, 16, 1, 128, 128), (1, 256, 3584), {}, SHARES),
    "sdxl": Case("sdxl", "Q8_0", (1, 4, 128, 128), (1, 77, 2048), {"pooled_output": (1, 1280)}, SHARES),
}


def make(case: Case, path: Path) -> dict[str, Any]:
    start_host()
    import gguf
    from pack.benchmarks import _model_files

    kind = gguf.GGMLQuantizationType[case.kind]
    size = _model_files.write(path, kind, case.shapes, getattr(_model_files, case.shapes)())
    return {"bytes": size}


def work(case: Case, path: Path, rounds: int) -> dict[str, Any]:
    """All rows of one case; the host is as `--disable-dynamic-vram` makes it, whose classic patcher is `off`."""
    start_host()
    import comfy.model_management
    import torch
    from pack.loaders.diffusion import load_diffusion_model
    from pack.offload.attach import stream
    from pack.offload.blocks import find_blocks
    from pack.offload.costs import SwapRequest
    from pack.offload.streamed_patcher import residency_of

    def streamed(share: float | None) -> Any:
        model = load_diffusion_model(path, disable_dynamic=True)
        if share is None:
            return model
        blocks = len(find_blocks(model.model.diffusion_model))
        return stream(model, SwapRequest(blocks_to_swap=round(share * blocks)) if share else SwapRequest())

    with torch.inference_mode():
        torch.randn(64, 64, device="cuda") @ torch.randn(64, 64, device="cuda")  # CUDA's own memory is not the model's
        before = _host_memory()
        wanted: dict[str, float | None] = {"off": None, "on": 0.0, **{f"{s:.0%}": s for s in case.shares}}
        rows: dict[str, dict[str, Any]] = {name: {f"{kind}s_ms": [] for kind in KINDS} for name in wanted}
        reference = None
        for turn in range(rounds):
            for name, share in list(wanted.items())[:: 1 if turn % 2 == 0 else -1]:
                model, row = streamed(share), rows[name]
                _sample(model, case, case.warm_up)
                steps, latent = _sample(model, case, case.steps)
                for kind in KINDS:
                    row[f"{kind}s_ms"] += [1e3 * getattr(step, kind) for step in steps[case.timed :]]
                reference = latent if reference is None else reference
                row["finite"] = bool(latent.isfinite().all())
                row["equal"] = row.get("equal", True) and torch.equal(latent, reference)
                row["difference"] = float((latent - reference).norm() / reference.norm())
                row["host_gb"] = (_host_memory() - before) / 1e9
                row["vram_gb"] = torch.cuda.memory_allocated() / 1e9
                if (residency := residency_of(model)) is not None and residency.plan.copies:
                    row["plan"], row["source"] = str(residency.plan), residency.choice.reason
                    row["copy_ms"], row["plans_made"] = residency.plan.copy_seconds * 1e3, residency.plans_made
                comfy.model_management.unload_all_models()
                del model
                comfy.model_management.soft_empty_cache()
                row["left_vram_gb"] = torch.cuda.memory_allocated() / 1e9
    for row in rows.values():
        for kind in KINDS:
            row[f"{kind}_ms"], row[f"least_{kind}_ms"] = median(row[f"{kind}s_ms"]), min(row[f"{kind}s_ms"])
    compute = min(rows["off"]["step_ms"], rows["on"]["step_ms"])
    for row in rows.values():
        row["ideal_ms"] = max(compute, row.get("copy_ms", 0))
    return rows


def start_host() -> None:
    sys.argv = ["main.py", "--disable-dynamic-vram"]
    try:
        import av  # noqa: F401
    except ImportError:  # video files only; machines without it can still sample
        from unittest.mock import MagicMock

        for name in ("av", "av.container", "av.subtitles", "av.subtitles.stream", "av.video", "av.video.reformatter"):
            sys.modules[name] = MagicMock()
    import comfy.options

    comfy.options.enable_args_parsing()


def _host_memory() -> int:
    """Bytes of RAM of this process's own: anonymous and shared, without files' pages."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


@dataclass(frozen=True)
class Step:
    """Seconds of one step."""

    step: float  # until the GPU had done it
    host: float  # until the thread had enqueued it
    busy: float  # that the thread ran meanwhile


KINDS = ("step", "host", "busy")


def _sample(model: Any, case: Case, steps: int) -> tuple[list[Step], Any]:
    """The steps of a run and its latent."""
    import comfy.sample
    import torch

    generator = torch.Generator().manual_seed(3)

    def tensor(value: Any) -> Any:
        return torch.randn(value, generator=generator) * 0.1 if isinstance(value, tuple) else value

    noise = torch.randn(case.latent, generator=generator)
    condition = [[tensor(case.context), {key: tensor(value) for key, value in case.conditioning.items()}]]
    taken: list[Step] = []
    began, ran = time.perf_counter(), time.thread_time()

    def on_step(*_: object) -> None:
        nonlocal began, ran
        host, busy = time.perf_counter() - began, time.thread_time() - ran
        torch.cuda.synchronize()
        taken.append(Step(time.perf_counter() - began, host, busy))
        began, ran = time.perf_counter(), time.thread_time()

    latent = comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", condition, condition, torch.zeros_like(noise),
        callback=on_step, disable_pbar=True, seed=1,
    )  # fmt: skip
    return taken, latent


def report(name: str, rows: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
    case = CASES[name]
    say(f"{name}: {case.shapes} {case.kind}, latent {case.latent}")
    for share, row in rows.items():
        say(
            f"  {share:>5}  step {row['step_ms']:8.1f} ms ({row['least_step_ms']:.1f})  "
            f"host {row['host_ms']:.1f} ({row['least_host_ms']:.1f}), busy {row['busy_ms']:.1f}  "
            f"ideal {row['ideal_ms']:8.1f}  x {row['step_ms'] / row['ideal_ms']:.3f}"
        )
        say(
            f"         equal {row['equal']} ({row['difference']:.1e})  VRAM {row['vram_gb']:5.2f} GB, "
            f"{row['left_vram_gb']:.2f} after unloading  RAM +{row['host_gb']:.2f} GB"
        )
        for key in ("plan", "source"):
            if key in row:
                say(f"         {row[key]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--work", type=Path, required=True, help="folder for the models")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--role", choices=("make", "work"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    _children.end_with_parent()
    if args.role:
        case = CASES[args.cases[0]]
        path = args.work / f"{case.shapes}-{case.kind}.gguf"
        rows = work(case, path, args.rounds) if args.role == "work" else make(case, path)
        args.out.write_text(json.dumps(rows), encoding="utf-8")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    results = {}
    launcher = [sys.executable, str(PACK / "tools" / "launch.py"), "--pack", sys.path[0], __file__]
    if not (Path(sys.path[0]) / "comfy").is_dir():
        launcher[3] = next(folder for folder in sys.path if (Path(folder) / "comfy").is_dir())
    for name in args.cases:
        case, answer = CASES[name], args.work / "answer.json"
        roles = ["work"] if (args.work / f"{case.shapes}-{case.kind}.gguf").exists() else ["make", "work"]
        for role in roles:
            answer.unlink(missing_ok=True)
            given = ["--role", role, "--work", str(args.work), "--out", str(answer), "--rounds", str(args.rounds), name]
            done = _children.run([*launcher, *given], capture_output=True, text=True, errors="replace")
            if not answer.exists():
                print(f"{name}: {role} failed\n{(done.stdout + done.stderr)[-3000:]}", flush=True)
                break
        else:
            results[name] = json.loads(answer.read_text(encoding="utf-8"))
            report(name, results[name], lambda text: print(text, flush=True))
    import torch

    gpu = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    args.out.write_text(json.dumps({"hardware": gpu, "results": results}, indent=1), encoding="utf-8")
    print(gpu)


if __name__ == "__main__":
    main()
