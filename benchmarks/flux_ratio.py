"""How many times as long as bf16 a GGUF model's sampling step takes, both in one process.

    python benchmarks/flux_ratio.py --work DIR --out results/flux_ratio.json [--dynamic] [--rounds 3] [FILE ...]

What flux_step.py measures in processes of their own, with the models of one process taking turns (A B A B) instead: at
256 x 256 pixels a step waits for Python, whose speed differs by a quarter from one process to the next on the same
machine, so that only neighbours in time can be compared; there are three times as many rounds of it.

FILE is bf16, q8_0 or q4_k; bf16 goes through core's loader, a GGUF file through the pack's node, under the host's
classic patcher or with --dynamic under its dynamic one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import flux_step

FILES = ("bf16", "q8_0", "q4_k")


def measure(work: Path, files: list[str], dynamic: bool, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of a step for each size of picture and file, one for each round."""
    flux_step.start_host(dynamic)
    import comfy.sample
    import comfy.sd
    import torch

    models = {}
    for file in files:
        path = flux_step.checkpoint(work, file)
        load = comfy.sd.load_diffusion_model if file == "bf16" else flux_step.pack_loader("sluice", path)
        models[file] = load(str(path))
    times: dict[str, dict[str, list[float]]] = {}
    for side in flux_step.PIXELS:
        found = times.setdefault(f"{side}px", {file: [] for file in files})
        for turn in range(1 + rounds * (3 if side == min(flux_step.PIXELS) else 1)):
            for file, model in models.items():
                _, step, image = flux_step.sample(comfy.sample, torch, model, side // 8)
                assert bool(image.isfinite().all())
                found[file] += [step] * (turn > 0)  # the first loads, binds and chooses
    return times


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
    missing = {file for file in args.files if not flux_step.checkpoint(args.work, file).exists()}
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
                f"{'dynamic' if args.dynamic else 'classic':8} {size:7} {file:5} {middle:7.2f} ms  "
                f"{middle / first:.3f} x {args.files[0]}  ({ratios[0]:.3f} to {ratios[-1]:.3f} by round)",
                flush=True,
            )


if __name__ == "__main__":
    main()
