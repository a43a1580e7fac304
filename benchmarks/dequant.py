"""Dequantisation on a GPU: every type right, then timed against the copy speed of the same run, then against others.

    python benchmarks/dequant.py --out dequant.json
    python benchmarks/dequant.py --quick --types Q4_K Q8_0
    python benchmarks/dequant.py --city96 DIR/ComfyUI-GGUF --vllm DIR   (DIR holds vllm_gguf_plugin/)

Needs torch with CUDA, Triton and gguf; no ComfyUI. Three parts; a type that is wrong in the first is not timed:

1. Every type, output type and alignment against the plain-torch reference, bit for bit, on random bytes.
2. Every type at three sizes, to bfloat16, for each candidate of (lanes, warps). A measurement is a CUDA graph of many
   launches that rotate over buffers larger than the second-level cache, replayed; the median counts. The copy beside
   it moves the same number of bytes in the same way, so that launch gaps and tails are in both.
3. What one call costs on the host, and the other implementations, by CUDA events where a graph is impossible.

GB/s are bytes read plus bytes written, 10^9.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
package = types.ModuleType("pack")  # the checkout as a package, without its __init__, which needs ComfyUI
package.__path__ = [str(ROOT)]
sys.modules["pack"] = package

from pack.loaders.gguf.types import BLOCKS, GGMLType  # noqa: E402
from pack.loaders.quant import reference  # noqa: E402
from pack.loaders.quant.kernels import dependent, kept, launch, programs  # noqa: E402

SIZES = ((16384, 5120), (9216, 3072), (3072, 3072))
CONFIGS = ((32, 1), (64, 1), (128, 4), (512, 4))  # (lanes, warps)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Call = Callable[[], object]


def random_bytes(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda")


def rotation(nbytes: int) -> int:
    """How many buffers of `nbytes` it takes until the first has left the cache."""
    return max(2, -(-3 * torch.cuda.get_device_properties(0).L2_cache_size // nbytes))


def seconds_by_graph(calls: list[Call], launches: int) -> float:
    """Seconds for one call: a graph of `launches` calls in rotation, median of 15 replays."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    return median_of_events(graph.replay, 15, warmup=3) / launches


def median_of_events(call: Call, repeats: int, warmup: int) -> float:
    for _ in range(warmup):
        call()
    spans = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        spans.append((start, stop))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in spans) / 1e3


def launches_for(nbytes: int) -> int:
    return max(10, min(100, int(4e9 / nbytes)))  # about 1 ms of work in a graph


def copy_seconds(nbytes: int) -> float:
    """A copy that reads and writes `nbytes` together."""
    half = nbytes // 2

    def call() -> Call:
        source, target = random_bytes(half), torch.empty(half, dtype=torch.uint8, device="cuda")
        return lambda: target.copy_(source)

    return seconds_by_graph([call() for _ in range(rotation(nbytes))], launches_for(nbytes))


def differences(got: torch.Tensor, want: torch.Tensor) -> int:
    """Elements that differ as bits and are not both NaN."""
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    return int(((got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())).sum())


def check(ggml_type: GGMLType, quick: bool) -> list[str]:
    """Complaints about `ggml_type`, empty when every output type and alignment is right."""
    layout = BLOCKS[ggml_type]
    blocks = 100_003
    buffer = random_bytes(blocks * layout.nbytes + 16)
    cases = [(dtype, 0) for dtype in DTYPES] + [(torch.bfloat16, offset) for offset in (1, 2, 4)]
    complaints = []
    for dtype, offset in cases[:1] if quick else cases:
        data = buffer[offset : offset + blocks * layout.nbytes]
        want = reference.dequantize(data, ggml_type, (blocks * layout.elements,), dtype)
        what = f"{ggml_type.name} {dtype} offset {offset}"
        try:
            got = launch.dequantize(data, ggml_type, want.shape, dtype, out=torch.full_like(want, 7.0))
        except Exception as error:  # the other types still count: a machine is not had twice
            complaints.append(f"{what}: {type(error).__name__}: {error}")
            continue
        if wrong := differences(got, want):
            complaints.append(f"{what}: {wrong} of {want.numel()} differ")
    return complaints


@dataclasses.dataclass
class Problem:
    """One type at one size: buffers in rotation, and how many bytes a dequantisation moves."""

    ggml_type: GGMLType
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        layout = BLOCKS[self.ggml_type]
        self.blocks = self.shape[0] * self.shape[1] // layout.elements
        self.nbytes = self.blocks * (layout.nbytes + 2 * layout.elements)
        self.buffers = [
            (random_bytes(self.blocks * layout.nbytes), torch.empty(self.shape, dtype=torch.bfloat16, device="cuda"))
            for _ in range(rotation(self.nbytes))
        ]

    def ours(self, lanes: int, warps: int) -> float:
        kernel = dataclasses.replace(launch.KERNELS[self.ggml_type], large=(lanes, warps), small=(lanes, warps))

        def call(data: torch.Tensor, out: torch.Tensor) -> Call:
            return lambda: launch.run_dequantize(kernel, self.ggml_type, data, out, self.blocks)

        return seconds_by_graph([call(*buffers) for buffers in self.buffers], launches_for(self.nbytes))

    def other(self, dequantize: Callable, by_graph: bool) -> float:
        def call(data: torch.Tensor) -> Call:
            return lambda: dequantize(data, self.ggml_type, self.shape)

        calls = [call(data) for data, _ in self.buffers]
        if by_graph:
            return seconds_by_graph(calls, min(20, launches_for(self.nbytes)))
        return median_of_events(lambda: [call() for call in calls], 5, warmup=2) / len(calls)


def city96(path: Path) -> Callable:
    """The torch dequantisers of ComfyUI-GGUF, from its dequant.py."""
    spec = importlib.util.spec_from_file_location("city96_dequant", path / "dequant.py")
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    def dequantize(data: torch.Tensor, ggml_type: GGMLType, shape: tuple[int, int]) -> torch.Tensor:
        qtype = GGMLQuantizationType(int(ggml_type))
        if qtype not in module.dequantize_functions:
            raise NotImplementedError("numpy on the CPU")
        elements, nbytes = GGML_QUANT_SIZES[qtype]
        rows = data.view(shape[0], shape[1] // elements * nbytes)
        return module.dequantize(rows, qtype, shape, torch.bfloat16)

    return dequantize


def vllm_plugin(path: Path) -> dict[str, Callable]:
    """The Triton and the CUDA dequantisers of vllm-gguf-plugin, without importing vLLM."""
    plugin = types.ModuleType("vllm_gguf_plugin")
    plugin.__path__ = [str(path / "vllm_gguf_plugin")]
    sys.modules["vllm_gguf_plugin"] = plugin
    interface = importlib.import_module("vllm_gguf_plugin.triton.dequantize.interface")
    torch.ops.load_library(str(next((path / "vllm_gguf_plugin").glob("_C_gguf*.so"))))
    functions = {"vllm triton": interface.ggml_dequantize_triton, "vllm cuda": torch.ops._C_gguf.ggml_dequantize}

    def adapt(function: Callable) -> Callable:
        def dequantize(data: torch.Tensor, ggml_type: GGMLType, shape: tuple[int, int]) -> torch.Tensor:
            if ggml_type in (GGMLType.TQ1_0, GGMLType.TQ2_0, GGMLType.MXFP4, GGMLType.NVFP4):
                raise NotImplementedError("type unknown to it")  # its CUDA function would write nothing
            rows = data.view(shape[0], -1)
            return function(rows, int(ggml_type), *shape, torch.bfloat16)

        return dequantize

    return {name: adapt(function) for name, function in functions.items()}


def host_microseconds(call: Call) -> float:
    """What one call costs the host: the launches queue up, nobody waits for them."""
    for _ in range(50):
        call()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200):
            call()
        best = min(best, (time.perf_counter() - start) / 200)
        torch.cuda.synchronize()
    return best * 1e6


def host_costs(ggml_type: GGMLType) -> dict[str, float]:
    """Microseconds of one call on 64 x 256 elements, in full and in parts."""
    layout, shape = BLOCKS[ggml_type], (64, 256)
    blocks = 64 * 256 // layout.elements
    data, out = random_bytes(blocks * layout.nbytes), torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    kernel = launch.KERNELS[ggml_type]
    lanes, warps = kernel.cut(out.numel())
    variant = launch.variant(kernel, data, out, dependent.allowed(data.device))
    bound = launch.bind(data, ggml_type, shape, torch.bfloat16)
    _, rest = kept._kept[variant]
    run = kept.bound(variant, launch.grid(kernel, lanes, blocks), data.device.index)
    assert run is not None, "this Triton is not started directly"
    source, target = data.data_ptr(), out.data_ptr()
    return {
        "dequantize": host_microseconds(lambda: launch.dequantize(data, ggml_type, shape, torch.bfloat16)),
        "dequantize into out": host_microseconds(
            lambda: launch.dequantize(data, ggml_type, shape, torch.bfloat16, out=out)
        ),
        "launch of a kept kernel": host_microseconds(
            lambda: launch.run_dequantize(kernel, ggml_type, data, out, blocks)
        ),
        "bound": host_microseconds(bound),
        "its launch alone": host_microseconds(lambda: run(source, target, blocks)),
        "launch through Triton": host_microseconds(
            lambda: programs.dequantize[(launch.grid(kernel, lanes, blocks), 1, 1)](
                data, out, blocks, *rest, num_warps=warps
            )
        ),
        "torch.empty": host_microseconds(lambda: torch.empty(shape, dtype=torch.bfloat16, device="cuda")),
    }


def measure(ggml_type: GGMLType, shape: tuple[int, int], configs: tuple, rivals: dict[str, tuple]) -> dict:
    """All configurations and all rivals on one problem, and the copy beside them."""
    problem = Problem(ggml_type, shape)
    rate = problem.nbytes / 1e9
    row: dict = {"type": ggml_type.name, "shape": shape, "bytes": problem.nbytes}
    row["copy"] = rate / copy_seconds(problem.nbytes)
    row["configs"] = {f"{lanes}/{warps}": rate / problem.ours(lanes, warps) for lanes, warps in configs}
    lanes, warps = launch.KERNELS[ggml_type].cut(shape[0] * shape[1])
    row["default"] = f"{lanes}/{warps}"
    if row["default"] not in row["configs"]:
        row["configs"][row["default"]] = rate / problem.ours(lanes, warps)
    row["best"] = max(row["configs"], key=row["configs"].__getitem__)
    for name, (dequantize, by_graph) in rivals.items():
        try:
            row[name] = rate / problem.other(dequantize, by_graph)
        except (NotImplementedError, ValueError, KeyError) as reason:
            row[name] = str(reason)
    return row


def print_row(row: dict, rivals: dict) -> None:
    copy, configs = row["copy"], row["configs"]
    shares = " ".join(f"{100 * gbs / copy:5.1f}" for gbs in configs.values())
    theirs = " ".join(f"{row[n]:11.0f}" if isinstance(row[n], float) else f"{'-':>11}" for n in rivals)
    size = "x".join(map(str, row["shape"]))
    microseconds = row["bytes"] / configs[row["default"]] / 1e3
    print(
        f"{row['type']:8s} {size:>11s} {copy:6.0f} {configs[row['default']]:6.0f} {microseconds:7.2f} "
        f"{100 * configs[row['default']] / copy:6.1f} {row['best']:>7s} | {shares} | {theirs}",
        flush=True,
    )


def print_choices(rows: list[dict]) -> None:
    """For each type the share of the copy at each size, and the best other configuration's where that is better."""
    print("\n% of the copy at each size by the table's configuration, (best of those tried)")
    for name in dict.fromkeys(row["type"] for row in rows):
        cells = []
        for row in (row for row in rows if row["type"] == name):
            mine, best = (100 * row["configs"][row[which]] / row["copy"] for which in ("default", "best"))
            cells.append(f"{row['default']:>6s} {mine:5.1f} ({row['best']} {best:.1f})")
        print(f"{name:8s} " + " | ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="names such as Q4_K; all when left out")
    parser.add_argument("--quick", action="store_true", help="one output type, one configuration")
    parser.add_argument("--out", type=Path, help="write all numbers here as JSON")
    parser.add_argument("--city96", type=Path, help="a checkout of ComfyUI-GGUF")
    parser.add_argument("--vllm", type=Path, help="the folder that holds vllm_gguf_plugin/")
    args = parser.parse_args()
    began = time.time()
    chosen = [GGMLType[name] for name in args.types] if args.types else list(launch.KERNELS)
    rivals: dict[str, tuple] = {}
    if args.city96:
        rivals["city96"] = (city96(args.city96), False)
    if args.vllm:
        rivals |= {name: (function, True) for name, function in vllm_plugin(args.vllm).items()}

    report: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(report)
    complaints = {ggml_type: check(ggml_type, args.quick) for ggml_type in chosen}
    wrong = [line for lines in complaints.values() for line in lines]
    right = [ggml_type for ggml_type in chosen if not complaints[ggml_type]]
    print("\n".join(wrong))
    print(f"{len(right)} of {len(chosen)} types equal the reference bit for bit ({time.time() - began:.0f} s)")

    report["copy of 1 GB"] = 2.0 / copy_seconds(2_000_000_000)
    print(f"copy of 1 GB: {report['copy of 1 GB']:.0f} GB/s")
    configs = () if args.quick else CONFIGS
    titles = " ".join(f"{lanes}/{warps}" for lanes, warps in configs)
    print(f"type            size   copy   GB/s      us   % of c.   best | % for {titles} | {' '.join(rivals)}")
    report["rows"] = []
    for shape in SIZES:
        for ggml_type in right:
            report["rows"].append(measure(ggml_type, shape, configs, rivals))
            print_row(report["rows"][-1], rivals)
    print_choices(report["rows"])
    report["host"] = {t.name: host_costs(t) for t in right if t in (GGMLType.Q4_K, GGMLType.IQ2_XS, GGMLType.Q8_0)}
    for name, costs in report["host"].items():
        print(f"host us, {name}: " + ", ".join(f"{what} {us:.1f}" for what, us in costs.items()))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))
    print(f"{time.time() - began:.0f} s")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
