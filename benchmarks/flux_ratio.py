"""How many times as long as bf16 a GGUF model's sampling step takes, both in one process.

    python benchmarks/flux_ratio.py --work DIR --out results/flux_ratio.json [--dynamic] [--rounds 3] [FILE ...]

What flux_step.py measures in processes of their own, with the models of one process taking turns (A B A B) instead: at
256 x 256 pixels a step waits for Python, whose speed differs by a quarter from one process to the next on the same
machine, so that only neighbours in time can be compared; there are three times as many rounds of it.

FILE is bf16, q8_0 or q4_k; bf16 goes through core's loader, a GGUF file through the pack's node, under the host's
classic patcher or with --dynamic under its dynamic one. `q8_0:late` is the model of `q8_0` with the launch of each
dequantising kernel after the end of the kernel before it (kernels/dependent.py says what is done otherwise); their
latents have to be equal as bits.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import flux_step

LATE = "late"
FILES = ("bf16", "q8_0", "q4_k")


def measure(work: Path, files: list[str], dynamic: bool, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of a step for each size of picture and file, one for each round."""
    flux_step.start_host(dynamic)
    import comfy.sample
    import comfy.sd
    import torch

    models: dict[str, Any] = {}
    for name in (file.partition(":")[0] for file in files):
        path = flux_step.checkpoint(work, name)
        if name not in models:
            load = comfy.sd.load_diffusion_model if name == "bf16" else flux_step.pack_loader("sluice", path)
            models[name] = load(str(path))
    times: dict[str, dict[str, list[float]]] = {}
    for side in flux_step.PIXELS:
        found = times.setdefault(f"{side}px", {file: [] for file in files})
        images: dict[str, Any] = {}
        for turn in range(1 + rounds * (3 if side == min(flux_step.PIXELS) else 1)):
            for file in files[:: 1 if turn % 2 else -1]:
                name, _, how = file.partition(":")
                if f"{name}:{LATE}" in files:
                    launched(models[name], late=how == LATE)
                _, step, image = flux_step.sample(comfy.sample, torch, models[name], side // 8)
                assert bool(image.isfinite().all())
                if turn:  # the first loads, binds and chooses
                    assert torch.equal(image, images.setdefault(name, image))
                    found[file].append(step)
    return times


def launched(model: Any, late: bool) -> None:
    """Have the kernels that dequantise `model` launched after the end of the kernel before, or as the pack does it."""
    quant = next(name for name in sys.modules if name.endswith("loaders.quant"))
    dependent, device = importlib.import_module(f"{quant}.kernels.dependent"), model.load_device
    dependent._reasons.pop(device, None)
    if late:
        dependent._reasons[device] = "to be measured"
    for layer in model.model.modules():
        if hasattr(layer, "forget_bound"):
            layer.forget_bound()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    command = " ".join(sys.argv)
    args.work.mkdir(parents=True, exist_ok=True)
    names = {file.partition(":")[0] for file in args.files}
    missing = {name for name in names if not flux_step.checkpoint(args.work, name).exists()}
    if missing:
        flux_step.run_self(["--role", "make", "--work", str(args.work), "--out", "-", *missing])
    times = measure(args.work, args.files, args.dynamic, args.rounds)
    report = {"hardware": flux_step.hardware(), "command": command, "dynamic_vram": args.dynamic, "step_ms": times}
    args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    for size, found in times.items():
        first = median(found[args.files[0]])
        for file, steps in found.items():
            middle = median(steps)
            ratios = sorted(a / b for a, b in zip(steps, found[args.files[0]], strict=True))
            print(
                f"{'dynamic' if args.dynamic else 'classic':8} {size:7} {file:9} {middle:7.2f} ms  "
                f"{middle / first:.3f} x {args.files[0]}  ({ratios[0]:.3f} to {ratios[-1]:.3f} by round)",
                flush=True,
            )


if __name__ == "__main__":
    main()
