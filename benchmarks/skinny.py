"""Multiplying 1 to 8 rows by a quantised weight: share of the memory roofline, and where dequantising gets faster.

    python benchmarks/skinny.py --out skinny.json
    python benchmarks/skinny.py --types Q4_K --configs

Needs torch with CUDA, Triton and gguf. The roofline is the time in which the same run reads the quantised bytes and
does nothing else. Times are those of CUDA graphs over weights in rotation that exceed the second-level cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
import triton
import triton.language as tl
from dequant import Call, host_microseconds, launches_for, random_bytes, rotation, seconds_by_graph
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant.kernels import launch

SHAPES = ((18432, 3072), (9216, 3072), (3072, 3072))
ROWS = (1, 2, 4, 8)
CONFIGS = ((2, 32), (4, 32), (2, 64), (4, 64))  # rows of the weight for a program, lanes for each


@triton.jit
def read(src, out, n, BLOCK: tl.constexpr):  # noqa: N803
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(src + i, mask=i < n, other=0), 0))


def read_seconds(nbytes: int) -> float:
    """How long it takes to read that many bytes; the best of three sizes of a program."""
    n = nbytes // 4
    sources = [random_bytes(n * 4).view(torch.int32) for _ in range(rotation(nbytes))]
    out = torch.empty(n // 1024 + 1, dtype=torch.int32, device="cuda")

    def call(source: torch.Tensor, block: int) -> Call:
        return lambda: read[(-(-n // block),)](source, out, n, block)

    return min(
        seconds_by_graph([call(source, block) for source in sources], launches_for(nbytes))
        for block in (1024, 2048, 4096)
    )


def measure(ggml_type: GGMLType, shape: tuple[int, int], configs: bool) -> dict:
    layout = BLOCKS[ggml_type]
    nbytes = shape[0] * shape[1] // layout.elements * layout.nbytes
    weights = [random_bytes(nbytes) for _ in range(rotation(nbytes))]
    kernel = launch.KERNELS[ggml_type]
    row: dict = {"type": ggml_type.name, "shape": shape, "read us": 1e6 * read_seconds(nbytes), "rows": {}}
    for m in ROWS:
        x = torch.randn(m, shape[1], dtype=torch.bfloat16, device="cuda")

        def linear(data: torch.Tensor, x=x, kernel=kernel) -> Call:
            return lambda: launch.linear(x, data, ggml_type, shape, kernel=kernel)

        def dense(data: torch.Tensor, x=x) -> Call:
            return lambda: torch.nn.functional.linear(x, launch.dequantize(data, ggml_type, shape, x.dtype))

        launches = min(40, launches_for(nbytes))
        row["rows"][m] = {
            "us": 1e6 * seconds_by_graph([linear(data) for data in weights], launches),
            "dequantised us": 1e6 * seconds_by_graph([dense(data) for data in weights], launches),
        }
        for rows, lanes in CONFIGS if configs else ():
            other = dataclasses.replace(kernel, skinny_rows=rows, skinny_lanes=lanes)
            seconds = seconds_by_graph([linear(data, kernel=other) for data in weights], launches)
            row["rows"][m][f"{rows}/{lanes} us"] = 1e6 * seconds
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="names such as Q4_K; all when left out")
    parser.add_argument("--configs", action="store_true", help="other configurations than the table's too")
    parser.add_argument("--out", type=Path, help="write all numbers here as JSON")
    args = parser.parse_args()
    report: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(report)
    report["measured"] = []
    for shape in SHAPES:
        for ggml_type in [GGMLType[name] for name in args.types] if args.types else launch.KERNELS:
            row = measure(ggml_type, shape, args.configs)
            report["measured"].append(row)
            cells = []
            for m, times in row["rows"].items():
                share = 100 * row["read us"] / times["us"]
                cells.append(f"M={m}: {share:3.0f}% " + " ".join(f"{name} {us:.1f}" for name, us in times.items()))
            print(f"{row['type']:8s} {shape} read {row['read us']:5.1f} us | " + " | ".join(cells), flush=True)
    data, x = random_bytes(144 * 64), torch.randn(1, 256, dtype=torch.bfloat16, device="cuda")
    report["host us"] = host_microseconds(lambda: launch.linear(x, data, GGMLType.Q4_K, (64, 256)))
    print(f"host: {report['host us']:.1f} us a call")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
