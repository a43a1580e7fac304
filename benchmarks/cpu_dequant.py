"""Dequantisation on a CPU: the pack's torch path, beside ComfyUI-GGUF's torch path in the same run, A B A B.

    python benchmarks/cpu_dequant.py --out results/cpu_dequant.json [--city96 FOLDER] [--types Q4_K Q8_0]

FOLDER is a checkout of city96's ComfyUI-GGUF, of which dequant.py is imported as it is; its default dtype (float16
arithmetic) is used, as its loader does unless told otherwise. Each side keeps its memory as its layers do: the pack in
a model's scratch buffer, the other in a new tensor for each call. 3072 x 3072 elements, to float32 (what ComfyUI
computes in on a CPU) and bfloat16. GB/s are bytes written, 10^9; the ratio is of medians.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import torch

ROOT = Path(__file__).resolve().parents[1]
package = types.ModuleType("pack")  # the checkout as a package, without its __init__, which needs ComfyUI
package.__path__ = [str(ROOT)]
sys.modules["pack"] = package

from pack.loaders.gguf.types import BLOCKS, QUANTISED, GGMLType  # noqa: E402
from pack.loaders.quant import reference  # noqa: E402
from pack.loaders.quant.scratch import Scratch  # noqa: E402

SHAPE = (3072, 3072)
ROUNDS = 7


def blocks_of(ggml_type: GGMLType) -> torch.Tensor:
    """Random blocks; bytes that read as a scale are made a small number wherever a scale may lie."""
    layout = BLOCKS[ggml_type]
    data = torch.randint(0, 256, (SHAPE[0] * SHAPE[1] // layout.elements, layout.nbytes), dtype=torch.uint8)
    small = torch.tensor([0x66, 0x0E], dtype=torch.uint8)  # the float16 0.0004
    for at in (0, 2, layout.nbytes - 4, layout.nbytes - 2):
        data[:, at : at + 2] = small
    return data


def ours(data: torch.Tensor, ggml_type: GGMLType, dtype: torch.dtype, scratch: Scratch) -> None:
    reference.dequantize(data, ggml_type, SHAPE, dtype, out=scratch.take(SHAPE, dtype))


def theirs(module: Any, data: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    module.dequantize(data, gguf.GGMLQuantizationType[name], SHAPE, dtype=None).to(dtype)


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--city96", type=Path)
    parser.add_argument("--types", nargs="*", default=[t.name for t in sorted(QUANTISED)])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    other: Any = None
    if args.city96:
        sys.path.insert(0, str(args.city96))
        other = importlib.import_module("dequant")
    rows = []
    for name in args.types:
        ggml_type = GGMLType[name]
        data = blocks_of(ggml_type)
        for dtype in (torch.float32, torch.bfloat16):
            sides = {"pack": partial(ours, data, ggml_type, dtype, Scratch())}
            if other is not None:
                sides["city96"] = partial(theirs, other, data, name, dtype)
            times: dict[str, list[float]] = {side: [] for side in sides}
            for turn in range(ROUNDS + 1):
                for side, call in sides.items():
                    taken = seconds(call)
                    if turn:  # the first warms up
                        times[side].append(taken)
            written = SHAPE[0] * SHAPE[1] * dtype.itemsize / 1e9
            row = {"type": name, "dtype": str(dtype)} | {side: written / median(t) for side, t in times.items()}
            if other is not None:
                row["ratio"] = row["pack"] / row["city96"]
            rows.append(row)
            print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v:14}" for k, v in row.items()), flush=True)
    report = {
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        "unit": "GB/s written",
        "rows": rows,
    }
    print(report["hardware"])
    if args.out:
        args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
