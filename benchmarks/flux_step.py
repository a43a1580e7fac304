"""The figure that matters: one sampling step of a FLUX-shaped model, GGUF against bf16, in a real ComfyUI on a GPU.

    python benchmarks/flux_step.py --work DIR --out results/flux_step.json [--rounds 2] [--free 0] [CASE ...]

A case is FILE:LOADER:DYNAMIC[:FREE], such as bf16:native:1 (core's loader, dynamic VRAM) or q4_k:sluice:0 (the pack's
node, classic patcher); FILE is bf16, fp8, q8_0 or q4_k, and LOADER+swap is a loader with Block Swap after it;
sluice-host is the pack's loader where the host manages the memory, under either patcher. FREE is how many GB of VRAM
the model is left with, instead of what --free says. Every run is a process of its own, the cases take turns (A B A B),
and each measures 1024 x 1024 and 256 x 256 pixels, or what --pixels says. VRAM is taken away by an allocation outside
torch. In the end, where bf16:native:0 is among the cases, each classic case with all VRAM is put beside it: its step to
bf16's, and its peak to what it may be, its file and OVERHEAD_GB more than bf16 takes beyond its own file.

The checkpoints (11.9 B parameters, FLUX.1-dev's shapes) are written to DIR when they are missing: 26 GB of RAM and
up to 57 GB of disk. The GGUF files are the bf16 file quantised (`_flux_files.py`). PYTHONPATH must hold ComfyUI and its
packages; `dev.py bench` sees to that.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import _children

PACK = Path(__file__).resolve().parents[1]
DEFAULT_CASES = ("bf16:native:1", "q8_0:sluice:0", "q4_k:sluice:0", "q8_0:sluice:1", "q4_k:sluice:1")
PIXELS = (1024, 256)
STEPS = 8
OVERHEAD_GB = 0.4


def make_checkpoints(folder: Path, kinds: set[str]) -> None:
    """Write what is missing of the FLUX-shaped checkpoints. In a process of its own, with a GPU if there is one."""
    sys.argv = sys.argv[:1]
    import _flux_files

    _flux_files.write(folder, kinds)


def checkpoint(folder: Path, kind: str) -> Path:
    return folder / f"flux_{kind}.{'gguf' if kind.startswith('q') else 'safetensors'}"


def start_host(dynamic: bool) -> None:
    """Set the host up as its main.py does, under its dynamic or its classic patcher."""
    sys.argv = ["main.py"] if dynamic else ["main.py", "--disable-dynamic-vram"]
    try:
        import av  # noqa: F401
    except ImportError:  # video files only; machines without it can still sample
        from unittest.mock import MagicMock

        for name in ("av", "av.container", "av.subtitles", "av.subtitles.stream", "av.video", "av.video.reformatter"):
            sys.modules[name] = MagicMock()
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy_aimdo.control
    from comfy.cli_args import enables_dynamic_vram

    if enables_dynamic_vram():
        comfy_aimdo.control.init(simple_vram_headroom=None)
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    if dynamic:
        devices = ((d.index, 0) for d in comfy.model_management.get_all_torch_devices())
        assert comfy_aimdo.control.init_devices(devices), "aimdo did not start"
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


def worker(path: Path, loader: str, dynamic: bool, free_gb: float, pixels: Sequence[int], steps: int) -> dict:
    """Load one checkpoint and time sampling steps."""
    start_host(dynamic)
    import comfy.model_management
    import comfy.sample
    import comfy.sd
    import torch

    loader, _, swap = loader.partition("+")
    load = comfy.sd.load_diffusion_model if loader == "native" else pack_loader(loader, path)
    block_swap = pack_swap() if swap else lambda model: model
    if free_gb:
        available, _ = torch.cuda.mem_get_info()
        ballast = ctypes.c_void_p()
        runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).split('.')[0]}")
        assert runtime.cudaMalloc(ctypes.byref(ballast), ctypes.c_size_t(int(available - free_gb * 1e9))) == 0
    start = time.perf_counter()
    model = block_swap(load(str(path)))
    result: dict = {"load_s": time.perf_counter() - start, "hardware": hardware()}
    torch.cuda.reset_peak_memory_stats()
    for side in pixels:
        for run in (1, 2):
            first, step, image = sample(comfy.sample, torch, model, side // 8, steps)
            assert bool(image.isfinite().all())
            result[f"{side}px"] = {"first_s": first, "step_ms": step} if run == 2 else {}
            result.setdefault("cold_first_s", first)
    result["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    result["peak_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
    result["memory_loaded"] = memory(torch)
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    result["memory_unloaded"] = memory(torch)
    result["after_eviction_first_s"], *_ = sample(comfy.sample, torch, model, pixels[0] // 8, steps)
    for name, module in sys.modules.items():
        if name.endswith("loaders.quant.dispatch") and loader != "native":
            result["dequantisation"] = module.choices()
        if name.endswith("offload.streamed_patcher") and (residency := module.residency_of(model)) is not None:
            result["plan"], result["plans_made"] = str(residency.plan), residency.plans_made
            result["source"] = residency.choice.reason if residency.choice else "nothing streams"
    return result


def memory(torch) -> dict[str, float]:
    """GB of VRAM and RAM that the process holds."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    rss = {line.split(":")[0]: int(line.split()[1]) / 1e6 for line in lines if line.startswith("Rss")}
    return {"vram_allocated_gb": torch.cuda.memory_allocated() / 1e9, **rss}


def pack_swap():
    """The pack's two Block Swap nodes, one after the other, as they are without any setting."""
    import asyncio

    host_nodes = importlib.import_module("nodes")
    if "SluiceApplyBlockSwap" not in host_nodes.NODE_CLASS_MAPPINGS:
        assert asyncio.run(host_nodes.load_custom_node(str(PACK))), "the pack does not load"
    config, apply = (host_nodes.NODE_CLASS_MAPPINGS[f"Sluice{n}"] for n in ("BlockSwapConfig", "ApplyBlockSwap"))
    return lambda model: apply.execute(model=model, block_swap=config.execute().args[0]).args[0]


def pack_loader(loader: str, path: Path):
    """The loader node of a pack, found and called as the host does; `sluice`, or NODE@FOLDER for another pack.
    `sluice-host` is what the node calls where it leaves the memory to the host."""
    import asyncio

    import folder_paths

    host_nodes = importlib.import_module("nodes")  # the host's, not the pack's

    node_id, _, folder = loader.partition("@")
    if ours := loader in ("sluice", "sluice-host"):
        node_id, folder = "SluiceDiffusionModelLoader", str(PACK)
    for kind in ("diffusion_models", "unet_gguf", "unet"):
        folder_paths.add_model_folder_path(kind, str(path.parent))
        if not ours:  # the pack under test has its own list; others widen the host's folders
            folder_paths.folder_names_and_paths.get(kind, (0, set()))[1].add(".gguf")
    assert asyncio.run(host_nodes.load_custom_node(folder)), f"{folder} does not load"
    node = host_nodes.NODE_CLASS_MAPPINGS[node_id]
    if loader == "sluice-host":
        package = node.__module__.partition(".nodes.")[0]
        load = importlib.import_module(f"{package}.loaders.diffusion").load_diffusion_model
        arriving = importlib.import_module(f"{package}.offload.attach_arrival").arriving
        return lambda file: arriving(load(file))
    if hasattr(node, "execute"):
        return lambda file: node.execute(model_name=Path(file).name).args[0]
    return lambda file: getattr(node(), node.FUNCTION)(Path(file).name)[0]


def sample(comfy_sample, torch, model, side: int, steps: int | None = None) -> tuple[float, float, Any]:
    """Seconds to the end of the first step, median milliseconds of the later ones, and the latent."""
    torch.manual_seed(0)
    noise = torch.randn(1, 16, side, side)
    condition = [[torch.randn(1, 256, 4096) * 0.1, {"pooled_output": torch.randn(1, 768) * 0.1, "guidance": 3.5}]]
    stamps: list[float] = []

    def on_step(*_: object) -> None:
        torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    start = time.perf_counter()
    image = comfy_sample.sample(
        model, noise, steps or STEPS, 1.0, "euler", "simple", condition, condition, torch.zeros_like(noise),
        callback=on_step, disable_pbar=True, seed=1,
    )  # fmt: skip
    return stamps[0] - start, median(b - a for a, b in itertools.pairwise(stamps)) * 1e3, image


def hardware() -> str:
    import torch

    gpu = torch.cuda.get_device_name()
    return f"{gpu}, torch {torch.__version__}, {os.cpu_count()} CPU cores ({platform.machine()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=DEFAULT_CASES)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pixels", type=int, nargs="+", default=PIXELS, help="sides of the pictures (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a picture (%(default)s)")
    parser.add_argument("--free", type=float, default=0, help="GB of VRAM to leave; 0 leaves all")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one run of a case (%(default)s)")
    parser.add_argument("--role", choices=("worker", "make"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    _children.end_with_parent()
    if args.role == "make":
        return make_checkpoints(args.work, set(args.cases))
    if args.role == "worker":
        kind, loader, dynamic, *free = args.cases[0].split(":")
        left = float(free[0]) if free else args.free
        result = worker(checkpoint(args.work, kind), loader, dynamic == "1", left, args.pixels, args.steps)
        args.out.write_text(json.dumps(result), encoding="utf-8")
        return None
    args.work.mkdir(parents=True, exist_ok=True)
    missing = {case.split(":")[0] for case in args.cases if not checkpoint(args.work, case.split(":")[0]).exists()}
    if missing:
        run_self(["--role", "make", "--work", str(args.work), "--out", "-", *missing])
    facts: dict[str, Any] = {"free_gb": args.free, "command": " ".join(sys.argv)}
    results: dict[str, list[dict]] = {case: [] for case in args.cases}
    for turn in range(args.rounds):
        for case in args.cases:
            answer = args.work / "answer.json"
            answer.unlink(missing_ok=True)
            command = ["--role", "worker", "--work", str(args.work), "--out", str(answer), "--free", str(args.free)]
            command += ["--steps", str(args.steps), "--pixels", *map(str, args.pixels), "--", case]
            try:
                done = run_self(command, check=False, timeout=args.limit)
            except subprocess.TimeoutExpired:
                print(f"{case}: not done within {args.limit:.0f} s", flush=True)
                continue
            if not answer.exists():
                print(f"{case}: failed\n{done.stderr[-3000:]}", flush=True)
                continue
            result = json.loads(answer.read_text(encoding="utf-8"))
            facts["hardware"] = result.pop("hardware")
            results[case].append(result)
            args.out.write_text(json.dumps({**facts, "results": results}, indent=1), encoding="utf-8")
            steps = "  ".join(f"{side}px {result[f'{side}px']['step_ms']:7.1f} ms" for side in args.pixels)
            print(
                f"round {turn} {case:40} load {result['load_s']:5.2f} s  first {result['cold_first_s']:5.2f} s  "
                f"after eviction {result['after_eviction_first_s']:5.2f} s  {steps}  "
                f"peak {result['peak_reserved_gb']:5.2f} GB",
                *(result[key] for key in ("plan", "source") if key in result),
                sep="\n    ",
                flush=True,
            )
    beside_bf16(args, results)
    return None


def beside_bf16(args: argparse.Namespace, results: dict[str, list[dict]]) -> None:
    """Print what classic cases with all VRAM took beside bf16. (Pages of dynamic VRAM are not in torch's peak.)"""

    def bytes_gb(case: str) -> float:
        return checkpoint(args.work, case.partition(":")[0]).stat().st_size / 1e9

    base = "bf16:native:0"
    if args.free or not results.get(base):
        return
    beyond = max(run["peak_reserved_gb"] for run in results[base]) - bytes_gb(base)
    for case, runs in results.items():
        _, _, dynamic, *free = case.split(":")
        if case == base or not runs or dynamic == "1" or any(map(float, free)):
            continue
        ratios = (
            f"{side}px {sum(r[f'{side}px']['step_ms'] for r in runs) / len(runs) / mean:.3f} x bf16"
            for side in args.pixels
            for mean in [sum(r[f"{side}px"]["step_ms"] for r in results[base]) / len(results[base])]
        )
        peak = max(run["peak_reserved_gb"] for run in runs)
        print(case, *ratios, f"peak {peak:.2f} of {bytes_gb(case) + OVERHEAD_GB + beyond:.2f} GB", sep="  ", flush=True)


def run_self(arguments: list[str], check: bool = True, timeout: float | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    return _children.run(command, check=check, capture_output=not check, text=True, timeout=timeout)


if __name__ == "__main__":
    main()
