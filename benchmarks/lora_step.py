"""LoRAs on a FLUX-shaped model on a GPU: time to the first step with one, cost of a step, VRAM; and others' beside.

    python benchmarks/lora_step.py --work DIR --out results/lora_step.json [--quick] [CASE ...]
    python benchmarks/lora_step.py --work DIR --out ... q8_0:sluice --adapters 128x1:auto 64x4:auto   (RANKxCOUNT:WAY)

A case is FILE:LOADER: q4_k:sluice (this pack), bf16:native (core's loader and core's LoRAs), q4_k:NODE@FOLDER (the
loader node of the pack in FOLDER, with core's LoRAs, which is how such packs are used).

DIR holds flux_step.py's checkpoints and is given what is missing. The adapters have random numbers for every matrix of
the double and single blocks, bfloat16, 0.15 GB at rank 16. All cases of a checkpoint run in one process, one after the
other, each between runs without any LoRA:

    select     seconds from choosing the LoRA (file in the page cache) to the end of the first step, beyond what a
               first step takes without one. Its parts: reading the file; finding the weights by name; the factors'
               way to the GPU; and the first step, beyond one without. Kernels that are started for the first time in
               this process (and that Triton compiles if it never has on this machine) begin to compile when the file
               is opened, and the first step waits for what is left of that. Those for common ranks are compiled
               while nobody runs the model after its first run (`idle_s`, before the first case; with --at-once nobody
               waits for that, as if the LoRA were chosen in the instant in which the first pictures are there)
    step       median of the later steps of 1024 x 1024 and 256 x 256 pixels; `to_without` is the mean of two runs with
               the LoRA over that of the run before it and the run after it
    vram       the most that was allocated on the device while sampling, beyond the most without; what is allocated
               between two runs, likewise; and the bytes of the adapters

`auto`, `runtime` and `merge` are the node's modes; `core` is ComfyUI's own arithmetic at each use of the weight (the
way of every adapter that is no plain LoRA), or, with another loader, ComfyUI's own LoRA node, which writes into plain
weights. Then each way of adding a LoRA to a dense weight, alone: the time for all weights of the blocks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))
import flux_step  # noqa: E402

RANKS = (16, 64, 128)
CASES = [
    *((rank, 1, "auto") for rank in RANKS),
    *((64, 1, way) for way in ("runtime", "merge", "core")),
    *((16, 4, "auto"), (64, 4, "auto"), (16, 8, "auto"), (64, 8, "auto"), (16, 4, "core")),
]
# Rows, lanes, warps, registers and programs to a processor of the kernel.
CUTS = ((64, 8, 4, 128, 4), (64, 8, 4, None, 3), (64, 8, 4, 128, 8), (64, 16, 4, None, 2), (128, 8, 8, 128, 2))
QUICK = 4  # cases
THEIR_CASES = [(64, 1, "core"), (16, 1, "core"), (128, 1, "core"), (16, 4, "core"), (64, 4, "core"), (64, 8, "core")]
DEFAULT_CASES = ("q4_k:sluice", "q8_0:sluice", "bf16:native")


def shapes(side: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in side.items()
        if name.startswith(("double_blocks.", "single_blocks.")) and name.endswith(".weight") and weight.dim() == 2
    }


def write_adapter(path: Path, weights: dict[str, tuple[int, int]], rank: int) -> None:
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    for name, (rows, columns) in weights.items():
        stem = "lora_unet_" + name.replace(".", "_")
        down = torch.randn(rank, columns, device="cuda", dtype=torch.bfloat16) / columns**0.5
        up = torch.randn(rows, rank, device="cuda", dtype=torch.bfloat16) * 0.02
        tensors |= {f"{stem}.lora_down.weight": down.cpu(), f"{stem}.lora_up.weight": up.cpu()}
        tensors[f"{stem}.alpha"] = torch.tensor(float(rank) / 2)
    save_file(tensors, path)


def adapters_of(words: list[str]) -> list[tuple[int, int, str]]:
    """What `--adapters` names, as in `CASES`."""
    return [(int(rank), int(count), way) for rank, count, way in (word.replace(":", "x").split("x") for word in words)]


def worker(
    named: str, folder: Path, out: Path, quick: bool, wanted: list[tuple[int, int, str]], at_once: bool = False
) -> None:
    """Run one case; what is known is written after every adapter, for whoever ends this early."""
    flux_step.start_host(dynamic=False)
    flux_step.STEPS = 5
    import comfy.sample
    import comfy.sd
    import torch

    kind, _, loader = named.partition(":")
    path, ours = flux_step.checkpoint(folder, kind), loader == "sluice"
    load = comfy.sd.load_diffusion_model if loader == "native" else flux_step.pack_loader(loader, path)
    model = load(str(path))
    pack = next((n for n in sys.modules if n.endswith("loaders.patch_at_use")), "").removesuffix("loaders.patch_at_use")
    weights = shapes(dict(model.model.diffusion_model.named_parameters()))
    for rank in RANKS:
        if not (folder / f"lora_{rank}.safetensors").exists():
            write_adapter(folder / f"lora_{rank}.safetensors", weights, rank)

    def sample(patcher: Any, side: int = 128) -> tuple[float, float, Any]:
        return flux_step.sample(comfy.sample, torch, patcher, side)

    def with_adapters(rank: int, count: int, way: str, spent: dict[str, float]) -> Any:
        file, patcher = folder / f"lora_{rank}.safetensors", model
        if not ours:
            for _ in range(count):
                read = comfy.utils.load_torch_file(str(file), safe_load=True)
                patcher = comfy.sd.load_lora_for_models(patcher, None, read, 1.0, 0)[0]
            return patcher
        lora = importlib.import_module(f"{pack}lora.apply")
        read = importlib.import_module(f"{pack}lora.read").read
        for _ in range(count):  # as of so many files
            start = time.perf_counter()
            adapter = read(file, partial(lora.expect_rank, patcher))  # as the node does
            spent["read_s"] = spent.get("read_s", 0) + time.perf_counter() - start
            patcher = lora.apply(adapter, patcher, None, 1.0, 0, "merge" if way == "core" else way).model
        if way == "core":  # the same patches as a function that does not know that they are plain
            at_use = importlib.import_module(f"{pack}loaders.patch_at_use").PatchAtUse
            for name, functions in patcher.weight_wrapper_patches.items():
                patcher.weight_wrapper_patches[name] = [at_use(f.key, f.patches) for f in functions]
        return patcher

    kept_kernels = importlib.import_module(f"{pack}loaders.quant.dispatch").kept_kernels if pack else lambda: 0
    result: dict[str, Any] = {"cases": []}
    sample(model)
    small = sample(model, 32)
    first, step, _ = sample(model)
    result["without"] = {"first_s": first, "step_ms": step, "small_step_ms": sample(model, 32)[1], "cold": small[1]}
    start = time.perf_counter()
    while not at_once and any(thread.name == "sluice-compile-idle" for thread in threading.enumerate()):
        time.sleep(0.02)
    result["idle_s"] = time.perf_counter() - start
    print(named, json.dumps({"without": result["without"], "idle_s": result["idle_s"]}), flush=True)
    reference, cases = None, (CASES if ours else THEIR_CASES)[: QUICK if quick else None]
    for rank, count, way in wanted or cases:
        torch.cuda.reset_peak_memory_stats()
        before_first, before_step, _ = sample(model)
        _, before_small, _ = sample(model, 32)
        before_peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        before_memory, kernels = torch.cuda.memory_allocated(), kept_kernels()
        start = time.perf_counter()
        spent: dict[str, float] = {}
        patcher = with_adapters(rank, count, way, spent)
        applied_s = time.perf_counter() - start
        comfy.model_management.load_models_gpu([patcher])
        torch.cuda.synchronize()
        loaded_s = time.perf_counter() - start
        first, step, image = sample(patcher)
        _, step2, image2 = sample(patcher)
        case = {
            **{"rank": rank, "count": count, "way": way, "applied_s": applied_s},
            "select_s": loaded_s + first - before_first,
            **spent,
            **{"names_s": applied_s - spent.get("read_s", 0), "to_gpu_s": loaded_s - applied_s},
            **{"first_step_s": first - before_first, "new_kernels": kept_kernels() - kernels},
            "step_ms": [step, step2],
            "small_step_ms": (small_step := sample(patcher, 32)[1]),
            "small_to_without": small_step / before_small,
            "vram_mb": (torch.cuda.max_memory_allocated() - before_peak) / 1e6,
            "vram_kept_mb": (torch.cuda.memory_allocated() - before_memory) / 1e6,
            "adapter_mb": count * sum(rank * (n + k) * 2 for n, k in weights.values()) / 1e6,
            "finite": bool(image.isfinite().all()),
            "run_2_to_run_1": float((image2 - image).norm() / image.norm()),
        }
        if (rank, count) == (64, 1):
            reference = image if way == "auto" else reference
            case["to_auto"] = float((image - reference).norm() / reference.norm()) if reference is not None else None
        del patcher, image, image2
        _, after_step, _ = sample(model)
        case["without_ms"] = [before_step, after_step]
        case["to_without"] = (step + step2) / (before_step + after_step)
        case["vram_after_mb"] = (torch.cuda.memory_allocated() - before_memory) / 1e6
        result["cases"].append(case)
        out.write_text(json.dumps(result), encoding="utf-8")
        print(named, json.dumps(case), flush=True)
    if ours and not quick and not wanted:
        result["alone"] = alone(pack, model, weights)
        out.write_text(json.dumps(result), encoding="utf-8")


def alone(pack: str, model: Any, weights: dict[str, tuple[int, int]]) -> list[dict]:
    """Milliseconds to make every dense weight of the model once, with a LoRA in it or without."""
    import torch

    low_rank = importlib.import_module(f"{pack}loaders.low_rank")
    dispatch = importlib.import_module(f"{pack}loaders.quant.dispatch")
    folded = importlib.import_module(f"{pack}loaders.quant.kernels.folded")
    model_weights = {n.removesuffix(".weight"): p for n, p in model.model.diffusion_model.named_parameters()}
    device, rows = torch.device("cuda"), []
    by_shape: dict[tuple, list] = {}
    for name, shape in weights.items():
        by_shape.setdefault(shape, []).append(model_weights[name])

    def total(call: Any) -> float:
        spent = 0.0
        for shape, found in by_shape.items():
            for weight in found[:2]:
                call(weight, shape)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            count = min(8, len(found))
            start.record()
            for weight in found[:count]:
                call(weight, shape)
            end.record()
            end.synchronize()
            spent += start.elapsed_time(end) * len(found) / count
        return spent

    def plain(weight: Any, shape: tuple) -> Any:
        return dispatch.dequantize(weight._qdata, weight._params.ggml_type, shape, torch.bfloat16)

    rows.append({"way": "without", "rank": 0, "ms": total(plain)})
    for rank in RANKS:
        factors = {
            shape: low_rank.Factors(
                [low_rank.Adapter(torch.randn(shape[0], rank), torch.randn(rank, shape[1]), 0.01)],
                device,
                torch.bfloat16,
            )
            for shape in by_shape
        }

        def addmm(weight: Any, shape: tuple, factors: Any = factors) -> Any:
            return factors[shape].fold(plain(weight, shape))

        def fused(weight: Any, shape: tuple, cut: tuple, factors: Any = factors) -> Any:
            found, ggml_type = factors[shape], weight._params.ggml_type
            out = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return folded.dequantize(weight._qdata, ggml_type, found.a, found.parts[0].b, out, folded.Cut(*cut))

        rows.append({"way": "addmm", "rank": rank, "ms": total(addmm)})
        for cut in CUTS:
            row: dict[str, Any] = {"way": f"fused, {folded.Cut(*cut)}", "rank": rank}
            try:
                row["ms"] = total(partial(fused, cut=cut))
            except Exception as error:  # a configuration that this GPU cannot run
                row["failed"] = str(error)[:200]
            rows.append(row)
        print(json.dumps(rows[-len(CUTS) - 1 :]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("cases", nargs="*", default=DEFAULT_CASES)
    parser.add_argument("--quick", action="store_true", help="the first cases only")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="RANKxCOUNT:WAY", help="these, not the usual ones")
    parser.add_argument("--at-once", action="store_true", help="do not wait for what is compiled in idle time")
    parser.add_argument("--role", choices=("worker",), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return worker(args.cases[0], args.work, args.out, args.quick, adapters_of(args.adapters), args.at_once)
    args.work.mkdir(parents=True, exist_ok=True)
    kinds = {case.partition(":")[0] for case in args.cases}
    missing = [kind for kind in kinds if not flux_step.checkpoint(args.work, kind).exists()]
    if missing:
        flux_step.run_self(["--role", "make", "--work", str(args.work), "--out", "-", *missing])
    report: dict[str, Any] = {"hardware": flux_step.hardware(), "command": " ".join(sys.argv), "results": {}}
    for case in args.cases:
        answer = args.work / "answer.json"
        answer.unlink(missing_ok=True)
        command = [sys.executable, str(HERE), "--role", "worker", "--work", str(args.work), "--out", str(answer)]
        options = [*(["--quick"] if args.quick else []), *(["--adapters", *args.adapters] if args.adapters else [])]
        options += ["--at-once"] if args.at_once else []
        subprocess.run([*command, case, *options], check=False)
        if answer.exists():
            report["results"][case] = json.loads(answer.read_text(encoding="utf-8"))
        args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
