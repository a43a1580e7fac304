"""How near the quantisers come to the weights, beside llama.cpp's, and how fast they are.

    python benchmarks/quantize_quality.py [--libgguf FOLDER] [--device cuda] [--out results/quantize_quality]

FOLDER has the package `libgguf` (llama.cpp's quantisers with Python bindings) in it, as `pip install --target FOLDER
libgguf` makes it; without it the table has our numbers only. Two sets of weights: 256 x 1024 Gaussian numbers, and 1024
rows of 256 taken evenly from the matrices of the blocks of the demo model.

`error` is the root mean square of the difference to the weights over the root mean square of the weights. Both sides
are decoded by the pack's reference. `weighed` is the same with each squared difference times the squared weight, which
is nearer to what llama.cpp's quantisers minimise; ours minimise `error`. Ratios are ours over theirs: better below 1.
Speed: the Gaussian set, in millions of weights a second; on a CPU a second of one core's time, so that it does not
matter what else the machine does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
package = types.ModuleType("pack")  # the checkout as a package, without its __init__, which needs ComfyUI
package.__path__ = [str(ROOT)]
sys.modules["pack"] = package

from pack.loaders.gguf.types import QUANTISED, GGMLType  # noqa: E402
from pack.loaders.quant import reference  # noqa: E402
from pack.loaders.quant.quantize import quantize  # noqa: E402
from pack.loaders.safetensors_file import SafetensorsFile  # noqa: E402

ROWS = 1024
SECONDS = 0.5  # of timing for each type, at least


def gaussian() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32))


def demo() -> torch.Tensor:
    weights = SafetensorsFile(ROOT / "demo" / "demo_mmdit.safetensors").weights()
    matrices = [w for w in weights if "blocks" in w.name and len(w.shape) == 2 and w.shape[1] % 256 == 0]
    rows = torch.cat([w.make().float().reshape(-1, 256) for w in matrices])
    return rows[:: len(rows) // ROWS][:ROWS].contiguous()


WEIGHTS = {"gaussian": gaussian, "demo": demo}


def errors(weights: torch.Tensor, blocks: torch.Tensor, ggml_type: GGMLType) -> dict[str, float]:
    decoded = reference.dequantize(blocks, ggml_type, weights.shape).double()
    exact = weights.double()
    squares = (decoded - exact).square()
    return {
        "error": float((squares.mean() / exact.square().mean()).sqrt()),
        "weighed": float(((squares * exact.square()).mean() / exact.pow(4).mean()).sqrt()),
    }


def speed(weights: torch.Tensor, ggml_type: GGMLType, device: str) -> float:
    now = time.process_time if device == "cpu" else time.perf_counter
    many = weights.to(device).repeat(64, 1) if device != "cpu" else weights
    quantize(many, ggml_type, device)
    start, calls = now(), 0
    while now() - start < SECONDS:
        quantize(many, ggml_type, device)
        calls += 1
    return calls * many.numel() / (now() - start) / 1e6


def hardware(device: str) -> str:
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if os.path.exists("/proc/cpuinfo") else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def measured(ggml_type: GGMLType, data: dict[str, torch.Tensor], other: Any, device: str) -> dict[str, Any]:
    row: dict[str, Any] = {"type": ggml_type.name}
    for name, weights in data.items():
        row[name] = errors(weights, quantize(weights, ggml_type, device), ggml_type)
        if other is not None:
            blocks = other.quantize_rows(weights.numpy(), other.GGMLQuantizationType[ggml_type.name])
            row[f"{name}_libgguf"] = errors(weights, torch.from_numpy(blocks), ggml_type)
    return row | {"million_weights_a_second": speed(data["gaussian"], ggml_type, device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libgguf", type=Path, metavar="FOLDER")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="without suffix: .json and .txt are written")
    args = parser.parse_args()
    other: Any = None
    if args.libgguf:
        sys.path.insert(0, str(args.libgguf))
        other = importlib.import_module("libgguf")
    data = {name: make() for name, make in WEIGHTS.items()}
    head = (
        f"{'type':8}" + "".join(f"{name:>10}{'libgguf':>9}{'ratio':>7}{'weighed':>8}" for name in data) + f"{'M/s':>8}"
    )
    lines, rows = [hardware(args.device), head], []
    print(*lines, sep="\n")
    for ggml_type in sorted(QUANTISED, key=lambda kind: kind.name):
        row = measured(ggml_type, data, other, args.device)
        rows.append(row)
        line = f"{row['type']:8}"
        for name in data:
            ours, theirs = row[name], row.get(f"{name}_libgguf")
            ratios = [f"{ours[key] / theirs[key]:.3f}" if theirs else "-" for key in ("error", "weighed")]
            line += f"{ours['error']:10.5f}{format(theirs['error'], '.5f') if theirs else '-':>9}"
            line += f"{ratios[0]:>7}{ratios[1]:>8}"
        lines.append(line + f"{row['million_weights_a_second']:8.1f}")
        print(lines[-1], flush=True)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps({"hardware": lines[0], "rows": rows}, indent=1) + "\n")
        args.out.with_suffix(".txt").write_text("\n".join(["python benchmarks/quantize_quality.py", *lines]) + "\n")


if __name__ == "__main__":
    main()
