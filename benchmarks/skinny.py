"""Multiplying 1 to 8 rows by a quantised weight: share of the memory roofline, and where dequantising gets faster.

    python benchmarks/skinny.py --out skinny.json
    python benchmarks/skinny.py --types Q4_K --shapes 18432x3072
    python benchmarks/skinny.py --compile --types Q4_K    (fills Triton's cache and measures nothing)
    python benchmarks/skinny.py --types Q4_K --cuts 2,1,2,2 1,1,2,4    (tiles, segment, stages, warps: see tiling.py)
    python benchmarks/skinny.py --rows 1 8 --seconds 60    (starts nothing new after that)
    python benchmarks/skinny.py --program-cuts 12,4 12,4,2    (warps, stages, split: few_rows.py)
    python benchmarks/skinny.py --vllm DIR                (DIR holds vllm_gguf_plugin/)

Needs torch with CUDA, Triton and gguf. The roofline is the time in which the same run reads the quantised bytes and
does nothing else. Times are those of CUDA graphs over weights in rotation that exceed the second-level cache. A kernel
that does nothing takes a microsecond in such a graph; a second share, in brackets, leaves that out on both sides.
"us" is a bound call, which a layer of a model makes; "unbound" is `multiply.linear`, "triton" what that does where the
CUDA program is not to be had. Bound calls of the CUDA program begin before the one in front has ended.
vllm-gguf-plugin's CUDA kernel for few rows, timed beside with --vllm, rounds x to eight bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
import triton.language as tl
from dequant import Call, host_microseconds, launches_for, random_bytes, rotation, seconds_by_graph
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant.kernels import driver, few_rows, launch, multiply, products, tiling

SHAPES = ((18432, 3072), (9216, 3072), (3072, 3072), (3072, 12288))
ROWS = (1, 2, 4, 8)
UNKNOWN_TO_VLLM = (GGMLType.TQ1_0, GGMLType.TQ2_0, GGMLType.MXFP4, GGMLType.NVFP4)


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


def launch_seconds() -> float:
    """What a kernel that does next to nothing takes in a graph."""
    source, out = random_bytes(4096).view(torch.int32), torch.empty(1, dtype=torch.int32, device="cuda")
    return seconds_by_graph([lambda: read[(1,)](source, out, 1024, 1024)], 100)


def compile_only(ggml_type: GGMLType, shape: tuple[int, int]) -> None:
    layout = BLOCKS[ggml_type]
    for m in ROWS:
        x = torch.randn(m, shape[1], dtype=torch.bfloat16, device="cuda")
        data = random_bytes(shape[0] * shape[1] // layout.elements * layout.nbytes)
        multiply.linear(x, data, ggml_type, shape)


def vllm_kernel(path: Path) -> Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]:
    torch.ops.load_library(str(next((path / "vllm_gguf_plugin").glob("_C_gguf*.so"))))
    return torch.ops._C_gguf.ggml_mul_mat_vec_a8


def by_triton(ggml_type: GGMLType, m: int) -> launch.Kernel | multiply.Fragment:
    """What is taken where the CUDA program is not."""
    fragment = multiply.FRAGMENTS.get(ggml_type)
    return fragment if fragment and fragment.cuts[(m - 1).bit_length()] else launch.KERNELS[ggml_type]


def bound(data: torch.Tensor, ggml_type: GGMLType, shape: tuple[int, int], x: torch.Tensor) -> Call:
    def unbound(x: torch.Tensor) -> torch.Tensor:
        return multiply.linear(x, data, ggml_type, shape)

    call = multiply.bind(data, ggml_type, shape, None, unbound)
    call(x)
    return lambda: call(x)


def cut_program(weights: list[torch.Tensor], x: torch.Tensor, ggml_type, shape, cut: str, ahead: bool) -> list[Call]:
    """The CUDA program, cut as it is asked for."""
    plan = few_rows.Plan(ggml_type, *shape, len(x), driver.gpu(0), few_rows.Cut(*map(int, cut.split(","))))
    call = products.Product(plan, x.dtype, 0, 0).call(ahead)
    out = torch.empty(len(x), shape[0], dtype=x.dtype, device=x.device)
    return [lambda data=data: call(data.data_ptr(), x.data_ptr(), None, out.data_ptr()) for data in weights]


def measure(
    ggml_type: GGMLType,
    shape: tuple[int, int],
    rows: Sequence[int],
    cuts: Sequence[str],
    program_cuts: Sequence[str],
    rival: Callable | None,
) -> dict:
    layout = BLOCKS[ggml_type]
    nbytes = shape[0] * shape[1] // layout.elements * layout.nbytes
    weights = [random_bytes(nbytes) for _ in range(rotation(nbytes))]
    read = 1e6 * read_seconds(nbytes)
    row: dict = {"type": ggml_type.name, "shape": shape, "bytes": nbytes, "read us": read, "rows": {}}
    for m in rows:
        x = torch.randn(m, shape[1], dtype=torch.bfloat16, device="cuda")

        def linear(data: torch.Tensor, x=x) -> Call:
            return lambda: multiply.linear(x, data, ggml_type, shape)

        config = by_triton(ggml_type, m)

        def triton_linear(data: torch.Tensor, x=x, config=config) -> Call:
            return lambda: multiply.linear(x, data, ggml_type, shape, None, config)

        def by_cut(cut: str, x=x) -> list[Call]:
            chosen = tiling.Cut(*map(int, cut.split(",")), above=0)
            tiled = dataclasses.replace(tiling.TILINGS[ggml_type], large=chosen, small=chosen)
            return [lambda data=data: multiply.linear(x, data, ggml_type, shape, None, tiled) for data in weights]

        def theirs(data: torch.Tensor, x=x) -> Call:
            blocks = data.view(shape[0], -1)
            return lambda: rival(blocks, x, int(ggml_type), shape[0])  # type: ignore[misc]

        def dense(data: torch.Tensor, x=x) -> Call:
            return lambda: torch.nn.functional.linear(x, launch.dequantize(data, ggml_type, shape, x.dtype))

        launches = min(40, launches_for(nbytes))
        row["rows"][m] = {
            "us": 1e6 * seconds_by_graph([bound(data, ggml_type, shape, x) for data in weights], launches),
            "unbound us": 1e6 * seconds_by_graph([linear(data) for data in weights], launches),
            "triton us": 1e6 * seconds_by_graph([triton_linear(data) for data in weights], launches),
            "dequantised us": 1e6 * seconds_by_graph([dense(data) for data in weights], launches),
        }
        if rival and ggml_type not in UNKNOWN_TO_VLLM:
            row["rows"][m]["vllm us"] = 1e6 * seconds_by_graph([theirs(data) for data in weights], launches)
        for cut in cuts if ggml_type in tiling.TILINGS else ():
            row["rows"][m][f"{cut} us"] = 1e6 * seconds_by_graph(by_cut(cut), launches)
        for cut in program_cuts if ggml_type in few_rows.TYPES else ():
            for name, ahead in (("", False), (" ahead", True)):
                calls = cut_program(weights, x, ggml_type, shape, cut, ahead)
                row["rows"][m][f"{cut}{name} us"] = 1e6 * seconds_by_graph(calls, launches)
    return row


def host_costs() -> dict[str, float]:
    """Microseconds of one call on 64 x 256 elements of Q4_K."""
    data, x = random_bytes(144 * 64), torch.randn(1, 256, dtype=torch.bfloat16, device="cuda")
    shape = (64, 256)
    bias = torch.zeros(64, dtype=torch.bfloat16, device="cuda")

    def linear(x: torch.Tensor) -> torch.Tensor:
        return multiply.linear(x, data, GGMLType.Q4_K, shape, bias)

    bound = multiply.bind(data, GGMLType.Q4_K, shape, bias, linear)
    return {"linear": host_microseconds(lambda: linear(x)), "bound": host_microseconds(lambda: bound(x))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="names such as Q4_K; all when left out")
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxCOLUMNS", help="such as 18432x3072")
    parser.add_argument("--cuts", nargs="+", default=[], help="other cuts of tiles, each as 2,1,2,2")
    parser.add_argument("--program-cuts", nargs="+", default=[], help="other cuts of the CUDA program, as 12,4,2")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="of x")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after that many")
    parser.add_argument("--vllm", type=Path, help="the folder that holds vllm_gguf_plugin/")
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--out", type=Path, help="write all numbers here as JSON")
    args = parser.parse_args()
    chosen = [GGMLType[name] for name in args.types] if args.types else list(launch.KERNELS)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes] if args.shapes else SHAPES
    if args.compile:
        for shape in shapes:
            for ggml_type in chosen:
                compile_only(ggml_type, shape)  # type: ignore[arg-type]
        return
    report: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(report)
    empty = report["launch us"] = 1e6 * launch_seconds()
    print(f"an empty kernel: {empty:.2f} us; shares: of the roofline (of the roofline, that left out on both sides)")
    report["measured"], began = [], time.monotonic()
    rival = vllm_kernel(args.vllm) if args.vllm else None
    for shape in shapes:
        for ggml_type in chosen:
            if time.monotonic() - began > args.seconds:
                break
            row = measure(ggml_type, shape, args.rows, args.cuts, args.program_cuts, rival)  # type: ignore[arg-type]
            report["measured"].append(row)
            cells = []
            for m, times in row["rows"].items():
                share, bare = row["read us"] / times["us"], (row["read us"] - empty) / (times["us"] - empty)
                us = " ".join(f"{name} {us:.1f}" for name, us in times.items())
                cells.append(f"M={m}: {100 * share:3.0f}% ({100 * bare:.0f}%) {us}")
            read = f"read {row['read us']:5.1f} us ({row['bytes'] / row['read us'] / 1e6:.2f} TB/s)"
            print(f"{row['type']:8s} {shape} {read} | " + " | ".join(cells), flush=True)
    report["host us"] = host_costs()
    print("host us, M = 1: " + ", ".join(f"{what} {us:.1f}" for what, us in report["host us"].items()))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
