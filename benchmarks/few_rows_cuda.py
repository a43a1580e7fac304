"""Multiplying few rows by a quantised weight: does a program in CUDA C, compiled by NVRTC, read faster than Triton's?

    python benchmarks/few_rows_cuda.py --out few_rows.json                       (the table, in less than a minute)
    python benchmarks/few_rows_cuda.py --sweep --seconds 110 --out sweep.json    (cuts: warps, stages, programs)
    python benchmarks/few_rows_cuda.py --types Q4_K --shapes 18432x3072 --rows 1 2 4 8 --cuts 12,4,1 6,4,2,1
    python benchmarks/few_rows_cuda.py --compile sm_90 sm_86                     (needs no GPU)

Needs torch with CUDA and Triton. Each type is first compared with the float64 product of the exact weight, with x of
both types, bias, and rows that do not fill a tile; one that is wrong, or does not compile, is said to be so and is not
timed. Then times as in skinny.py: CUDA graphs over weights in rotation that exceed the second-level cache, beside
reading the bytes; without arithmetic, without copies, and "ahead", which lets a program start before the one in front
of it has ended; and, for as long as --seconds allows, beside the Triton program that `multiply.linear` takes.
A kernel that does nothing takes a microsecond in such a graph.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dequant import launches_for, random_bytes, rotation, seconds_by_graph
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant import reference

import _few_rows as few  # isort: skip  (imports the package that dequant has made)
from skinny import launch_seconds, read_seconds  # isort: skip

SHAPES = ((18432, 3072), (3072, 3072), (3072, 12288), (9216, 3072))
TYPES = (GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q4_K, GGMLType.Q6_K)  # when none are asked for; there are more
CUT = few.Cut()
AHEAD = few.Cut(ahead=1)  # what it would be if the kernel in front did not have to end first
PARTS = {"arithmetic alone": few.Cut(without=1), "copies alone": few.Cut(without=2)}
SWEEP = tuple(
    few.Cut(*cut)
    for cut in (
        (12, 2, 1),
        (12, 3, 1),
        (12, 4, 1),
        (12, 6, 1),
        (6, 3, 1),
        (6, 6, 1),
        (6, 2, 2),
        (6, 4, 2),
        (4, 4, 2),
        (4, 3, 3),
        (12, 4, 1, 1),
        (12, 4, 1, 2),
    )
)
SCALES = {  # where the halves of a block that scale it are
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
}
# Rows that fill a program's warps, an odd number of slices, and several goes with warps left over; a few types of x and
# of the result for each.
CHECKED = (
    ((5000, 3072), 8, torch.bfloat16, torch.float32),
    ((5000, 3072), 1, torch.bfloat16, torch.bfloat16),
    ((5000, 3072), 5, torch.float16, torch.float32),
    ((77, 2816), 8, torch.bfloat16, torch.float32),
    ((777, 7168), 3, torch.bfloat16, torch.float32),
)


def label(cut: few.Cut) -> str:
    return f"{cut.warps},{cut.stages},{cut.programs},{cut.split}"


def weight(ggml_type: GGMLType, shape: tuple[int, int]) -> torch.Tensor:
    """Random bytes, but for scales between 2^-10 and 2^-6."""
    layout = BLOCKS[ggml_type]
    data = random_bytes(shape[0] * shape[1] // layout.elements * layout.nbytes)
    blocks = data.view(-1, layout.nbytes)
    for at in SCALES.get(ggml_type, (0,)):
        exponent = torch.randint(-10, -6, (len(blocks), 1), device="cuda")
        halves = ((1 + torch.rand(len(blocks), 1, device="cuda")) * 2.0**exponent).half()
        blocks[:, at : at + 2] = halves.view(torch.uint8)
    return data


def check(ggml_type: GGMLType, cut: few.Cut) -> dict[str, float]:
    """The worst error as a share of what is allowed, and how much nearer the product is than one with the weight
    rounded to bfloat16.

    Raises:
        ValueError: a wrong product.
    """
    worst, nearer = 0.0, float("inf")
    for shape, m, dtype, result in CHECKED:
        data = weight(ggml_type, shape)
        w = reference.dequantize(data, ggml_type, shape, torch.float32).double()
        bias = torch.randn(shape[0], device="cuda")
        x = torch.randn(m, shape[1], device="cuda").to(dtype)
        want = x.double() @ w.T + bias.double()
        got = few.Product(data, ggml_type, shape, cut, bias)(x, torch.full_like(want, 7.0, dtype=result))
        errors = (got.double() - want).abs()
        rounding = 2.0**-23 if result == torch.float32 else 2.0**-8
        allowed = few.bound(ggml_type, x.double(), w) + rounding * want.abs()
        worst = max(worst, float((errors / allowed).nan_to_num(float("inf")).max()))
        if worst >= 1:
            raise ValueError(f"wrong: {m} rows of {dtype} by {shape}: {worst:.3g} times what is allowed")
        if result == torch.float32:
            rounded = (x.double() @ w.bfloat16().double().T + bias.double() - want).abs().mean()
            nearer = min(nearer, float(rounded / errors.mean()))
    return {"worst": worst, "nearer": nearer}


def variants(types: Sequence[GGMLType], cuts: Sequence[few.Cut], shapes: Sequence[tuple[int, int]]) -> set:
    """What `check` and the measurements will have compiled."""
    wanted = [(*case, cut) for case in CHECKED for cut in cuts]
    wanted += [(shape, 8, torch.bfloat16, torch.bfloat16, cut) for shape in shapes for cut in cuts]
    wanted += [(shape, 8, torch.bfloat16, torch.bfloat16, AHEAD) for shape in shapes]
    wanted += [(shapes[0], 8, torch.bfloat16, torch.bfloat16, cut) for cut in PARTS.values()]
    found = set()
    for (n, k), m, dtype, result, cut in wanted:
        for ggml_type in types:
            found.add(few.Plan(ggml_type, n, k, m, cut, *few.facts(0)).definitions(dtype, result))
    return found


class Measured:
    """Times of one type and shape, in microseconds; weights are made once for all that is timed."""

    def __init__(self, ggml_type: GGMLType, shape: tuple[int, int]) -> None:
        self.ggml_type, self.shape = ggml_type, shape
        one = weight(ggml_type, shape)
        self.name = f"{ggml_type.name:5s} {shape[0]}x{shape[1]}"
        self.nbytes = one.numel()
        w = reference.dequantize(one, ggml_type, shape, torch.float32).double()
        self.x = torch.randn(few.ROWS, shape[1], dtype=torch.bfloat16, device="cuda")
        self.want = self.x.double() @ w.T
        self.allowed = few.bound(ggml_type, self.x.double(), w) + 2.0**-8 * self.want.abs()
        self.weights = [one] + [one.roll(4096 * BLOCKS[ggml_type].nbytes * i) for i in range(1, rotation(self.nbytes))]
        self.launches = min(40, launches_for(self.nbytes))
        self.row: dict[str, Any] = {"type": ggml_type.name, "shape": shape, "read us": 1e6 * read_seconds(self.nbytes)}

    def cuda(self, m: int, cut: few.Cut) -> float:
        """Raises: ValueError for a wrong product."""
        x, want, allowed = self.x[:m].contiguous(), self.want[:m], self.allowed[:m]
        out = torch.empty(m, self.shape[0], dtype=torch.bfloat16, device="cuda")
        products = [few.Product(data, self.ggml_type, self.shape, cut) for data in self.weights]
        if not cut.without and not bool(((products[0](x, out).double() - want).abs() <= allowed).all()):
            raise ValueError(f"wrong for {m} rows")
        return 1e6 * seconds_by_graph([lambda p=p: p(x, out) for p in products], self.launches)

    def triton(self, m: int) -> float:
        from pack.loaders.quant.kernels import multiply

        x = self.x[:m].contiguous()
        calls = [lambda d=d: multiply.linear(x, d, self.ggml_type, self.shape) for d in self.weights]
        return 1e6 * seconds_by_graph(calls, self.launches)

    def cell(self, name: str, m: int, us: float) -> str:
        self.row[f"{name} M={m} us"] = us
        return f"{us:6.1f} ({100 * self.row['read us'] / us:3.0f}%)"


def compile_for(architectures: Sequence[str], types: Sequence[GGMLType]) -> None:
    for architecture in architectures:
        small = 101376 if architecture not in ("sm_90", "sm_100") else 232448
        for ggml_type in types:
            for dtype in (torch.bfloat16, torch.float16):
                plan = few.Plan(ggml_type, 18432, 3072, 8, CUT, 132, small)
                code = few.compiled(plan.definitions(dtype, dtype), architecture)
                print(f"{architecture} {ggml_type.name} {dtype}: {len(code)} bytes, {plan.stages_and_rows}")


def right(types: Sequence[GGMLType], cuts: Sequence[few.Cut], report: dict) -> list[tuple[GGMLType, few.Cut]]:
    """The types and cuts that give the right product; a device that is lost is an error."""
    found = []
    for ggml_type in types:
        for cut in cuts:
            name = f"{ggml_type.name} {label(cut)}"
            report["checked"][name] = "did not come back"
            try:
                report["checked"][name] = check(ggml_type, cut)
                found.append((ggml_type, cut))
                if len(cuts) == 1:
                    print(f"{name}: right, {report['checked'][name]}", flush=True)
            except (few.CudaError, ValueError) as error:  # the others still count: a machine is not had twice
                report["checked"][name] = str(error)
                print(f"{name}: {str(error)[:600]}", flush=True)
                torch.cuda.synchronize()  # raises if the device is lost
    return found


def measure(args: argparse.Namespace, types: Sequence[GGMLType], report: dict, began: float) -> None:
    cuts = args.cuts or (SWEEP if args.sweep else (CUT,))
    few.compile_ahead(variants(types, cuts[:1] if args.sweep else cuts, args.shapes), few.architecture_of(0))
    print(f"compiled, {time.monotonic() - began:.1f} s", flush=True)
    found = right(types, cuts[:1] if args.sweep else cuts, report)
    if args.sweep:  # other cuts than the first are checked as they are timed
        few.compile_ahead(variants(types, cuts, args.shapes), few.architecture_of(0))
        found = [(ggml_type, cut) for ggml_type, _ in found for cut in cuts]
    all_measured = []
    for shape in args.shapes:
        for ggml_type in dict.fromkeys(ggml_type for ggml_type, _ in found):
            if time.monotonic() - began > args.seconds:
                print("out of time", flush=True)
                return
            measured = Measured(ggml_type, shape)
            all_measured.append(measured)
            report["measured"].append(measured.row)
            for cut in [cut for t, cut in found if t is ggml_type]:
                name, cells = f"cuda {label(cut)}", []
                if time.monotonic() - began > args.seconds:
                    break
                try:
                    for m in args.rows:
                        cells.append(f"M={m} {measured.cell(name, m, measured.cuda(m, cut))}")
                except (few.CudaError, ValueError) as error:
                    cells.append(str(error)[:200])
                    torch.cuda.synchronize()
                read = f"read {measured.row['read us']:5.1f} us"
                print(f"{measured.name} {read} | {name}: " + " ".join(cells), flush=True)
            if args.sweep:
                measured.weights.clear()
    if args.sweep or args.cuts:
        return
    for measured in all_measured:
        others = {"ahead": AHEAD} | (PARTS if measured.shape == args.shapes[0] else {})
        for name, cut in others.items():
            try:
                cells = [f"M={m} {measured.cell(name, m, measured.cuda(m, cut))}" for m in args.rows]
            except (RuntimeError, ValueError) as error:
                cells = [str(error)[:200]]
                torch.cuda.synchronize()
            print(f"{measured.name} | {name}: " + " ".join(cells), flush=True)
    for measured in all_measured:
        cells = []
        for m in (args.rows[0], args.rows[-1]) if len(args.rows) > 1 else args.rows:
            if time.monotonic() - began < args.seconds:
                cells.append(f"M={m} {measured.cell('triton', m, measured.triton(m))}")
        if cells:
            print(f"{measured.name} | triton: " + " ".join(cells), flush=True)


def elsewhere(types: Sequence[GGMLType], args: argparse.Namespace, spent: float) -> None:
    """Go on with the types that are left in a process of its own: this one has lost the device."""
    rest = [sys.executable, __file__, "--types", *(t.name for t in types), "--rows", *map(str, args.rows)]
    rest += ["--shapes", *(f"{n}x{k}" for n, k in args.shapes), "--seconds", str(args.seconds - spent)]
    rest += ["--sweep"] if args.sweep else []
    if args.cuts:
        rest += ["--cuts", *map(label, args.cuts)]
    if args.out:
        rest += ["--out", str(args.out.with_name(f"{args.out.stem}_{types[0].name}.json"))]
    subprocess.run(rest, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="names such as Q4_K; four when left out")
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxCOLUMNS", help="such as 18432x3072")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8], help="of x")
    parser.add_argument("--cuts", nargs="+", metavar="WARPS,STAGES,PROGRAMS,SPLIT", help="other cuts, each as 12,4,1,0")
    parser.add_argument("--sweep", action="store_true", help="time a list of cuts, and nothing of Triton")
    parser.add_argument("--seconds", type=float, default=45, help="start nothing new after that many")
    parser.add_argument("--compile", nargs="+", metavar="ARCHITECTURE", help="only compile, such as for sm_90")
    parser.add_argument("--out", type=Path, help="write all numbers here as JSON")
    args = parser.parse_args()
    types = [GGMLType[name] for name in args.types] if args.types else list(TYPES)
    args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes] if args.shapes else list(SHAPES)
    args.cuts = [few.Cut(*map(int, cut.split(","))) for cut in args.cuts or ()]
    if args.compile:
        compile_for(args.compile, types)
        return
    began = time.monotonic()
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    report |= {"launch us": 1e6 * launch_seconds(), "checked": {}, "measured": []}
    print({name: report[name] for name in ("gpu", "torch", "launch us")}, flush=True)
    try:
        measure(args, types, report, began)
    except RuntimeError as error:
        print(f"the device is lost: {type(error).__name__}: {error}", flush=True)
        tried = {name.split()[0] for name in report["checked"]} | {row["type"] for row in report["measured"]}
        left = [ggml_type for ggml_type in types if ggml_type.name not in tried]
        if left:
            elsewhere(left, args, time.monotonic() - began)
    finally:
        if args.out:
            args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
